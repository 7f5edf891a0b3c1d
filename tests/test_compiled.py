"""What XLA makes of a fused program: weights are arguments, read in place."""

from math import prod

import jax
import jax.numpy as jnp
import pytest

import coalesce
from coalesce import jaxpr as J
from coalesce.lanes import Shared, Stacked
from coalesce.lower_results import by_lane
from coalesce.models import by_name
from tests.compare import assert_bitwise
from tests.hlo import instructions, moves_of_size, rearranged, weights_written_again

# Models whose weights are larger than any activation at batch 1, so that a move of that size can only be a weight's.
WEIGHTY = {
    "mlp": {"width": 256, "layers": 3},
    "lstm": {},
    "gru": {},
    "dlrm": {"max_rows": 50},
}


def fuse_of(name: str, tenants: int, **options) -> coalesce.Fused:
    model = by_name(name, **WEIGHTY[name])
    params = jax.eval_shape(model.init, jax.random.key(0))
    progs = [coalesce.trace(model.apply, params, *model.inputs(1), name=f"{name}{i}") for i in range(tenants)]
    return coalesce.fuse(progs, **options)


def largest_weight(fused: coalesce.Fused) -> int:
    return max(prod(array.shape) for array in fused.bundle.arrays)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("name", WEIGHTY)
def test_no_move_of_the_size_of_a_weight(name, within):
    fused = fuse_of(name, 3, within_program=within)
    assert moves_of_size(fused.as_text(), largest_weight(fused)) == []
    if name != "dlrm":  # whose rows of tables are joined
        assert weights_written_again(fused) == []


def test_the_reader_of_hlo_sees_a_move():
    """The check above can fail: stacking weights on each call is seen."""
    structs = [jax.ShapeDtypeStruct((64, 64), "float32")] * 2
    text = jax.jit(lambda a, b: jax.numpy.stack([a, b]) * 2).lower(*structs).compile().as_text() or ""
    assert moves_of_size(text, 64 * 64)
    assert any(i.opcode == "parameter" for i in instructions(text))


MOVES = {
    "padded": lambda w: jnp.pad(w, 3),
    "turned": lambda w: w.T,
    "backwards": lambda w: w[::-1],
    "picked": lambda w: w[jnp.array([2, 0, 1, 2])],
    "joined": lambda w: jnp.concatenate([w, w[:8]]),
    "cast": lambda w: w.astype(jnp.bfloat16),
    "computed": lambda w: w * 2.0 + 1.0,
    "summed": lambda w: w.sum(0),
}
UNSEEN = ("computed", "summed")


@pytest.mark.parametrize("name", MOVES)
def test_the_reader_of_hlo_sees_weights_that_are_written_once_more(name):
    w = jax.ShapeDtypeStruct((64, 64), "float32")
    text = jax.jit(lambda x, w: (x + 1, MOVES[name](w))).lower(w, w).compile().as_text() or ""
    assert bool(rearranged(text, {1}, 4 * 64)) == (name not in UNSEEN)
    assert rearranged(text, {0}, 1) == rearranged(text, {1}, 10**6) == []


IN_PARTS = {
    "a loop": """\
%body (p: (s32[], f32[64,64], f32[64,64])) -> (s32[], f32[64,64], f32[64,64]) {
  %p = (s32[], f32[64,64], f32[64,64]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[64,64] get-tuple-element(%p), index=1
  %w = f32[64,64] get-tuple-element(%p), index=2
  %again = f32[64,64] copy(%w)
  %y = f32[64,64] add(%x, %again)
  ROOT %t = (s32[], f32[64,64], f32[64,64]) tuple(%i, %y, %w)
}
ENTRY %main (x: f32[64,64], w: f32[64,64]) -> f32[64,64] {
  %x.1 = f32[64,64] parameter(0)
  %w.1 = f32[64,64] parameter(1)
  %zero = s32[] constant(0)
  %t.1 = (s32[], f32[64,64], f32[64,64]) tuple(%zero, %x.1, %w.1)
  %loop = (s32[], f32[64,64], f32[64,64]) while(%t.1), condition=%c, body=%body
  ROOT %out = f32[64,64] get-tuple-element(%loop), index=1
}
""",
    "a fusion of several results": """\
%fused (p0: f32[64,64]) -> (f32[64,64], f32[64,64]) {
  %p0 = f32[64,64] parameter(0)
  %turned = f32[64,64] transpose(%p0), dimensions={1,0}
  %sine = f32[64,64] sine(%p0)
  ROOT %t = (f32[64,64], f32[64,64]) tuple(%turned, %sine)
}
ENTRY %main (x: f32[64,64], w: f32[64,64]) -> f32[64,64] {
  %x.1 = f32[64,64] parameter(0)
  %w.1 = f32[64,64] parameter(1)
  ROOT %f = (f32[64,64], f32[64,64]) fusion(%w.1), kind=kLoop, calls=%fused
}
""",
    "a call": """\
%called (p0: f32[64,64]) -> f32[64,64] {
  %p0 = f32[64,64] parameter(0)
  ROOT %again = f32[64,64] copy(%p0)
}
ENTRY %main (x: f32[64,64], w: f32[64,64]) -> f32[64,64] {
  %x.1 = f32[64,64] parameter(0)
  %w.1 = f32[64,64] parameter(1)
  ROOT %f = f32[64,64] call(%w.1), to_apply=%called
}
""",
    "a branch": """\
%first (p0: f32[64,64]) -> f32[64,64] {
  ROOT %p0 = f32[64,64] parameter(0)
}
%second (p1: f32[64,64]) -> f32[64,64] {
  %p1 = f32[64,64] parameter(0)
  ROOT %again = f32[64,64] copy(%p1)
}
ENTRY %main (x: f32[64,64], w: f32[64,64], i: s32[]) -> f32[64,64] {
  %x.1 = f32[64,64] parameter(0)
  %w.1 = f32[64,64] parameter(1)
  %i.1 = s32[] parameter(2)
  ROOT %f = f32[64,64] conditional(%i.1, %x.1, %w.1), branch_computations={%first, %second}
}
""",
}


@pytest.mark.parametrize("name", IN_PARTS)
def test_the_reader_of_hlo_looks_into_parts_of_a_program(name):
    assert len(rearranged(IN_PARTS[name], {1}, 64 * 64)) == 1
    assert rearranged(IN_PARTS[name], {0}, 1) == rearranged(IN_PARTS[name], {1}, 64 * 64 + 1) == []


GEMM_FUSION = """\
%{name} (parameter_0: f32[25,64], parameter_1: f32[64,64], parameter_2: f32[64,64]) -> f32[25,128] {{
  %parameter_0 = f32[25,64]{{1,0}} parameter(0)
  %parameter_1 = f32[64,64]{{1,0}} parameter(1)
  %parameter_2 = f32[64,64]{{1,0}} parameter(2)
  %concatenate.2 = f32[64,128]{{1,0}} concatenate(%parameter_1, %parameter_2), dimensions={{1}}
  ROOT %dot.81 = f32[25,128]{{1,0}} dot(%parameter_0, %concatenate.2), lhs_contracting_dims={{1}}
}}
"""


@pytest.mark.parametrize(("name", "moves"), [("gemm_fusion_dot.79_computation", 0), ("main.1", 1)])
def test_a_product_on_a_gpu_reads_tiles_where_they_lie(name, moves):
    """XLA joins products of one operand; within a GEMM fusion that writes no joined weights, elsewhere it does."""
    assert len(moves_of_size(GEMM_FUSION.format(name=name), 64 * 64)) == moves


def test_weights_are_arguments_one_array_a_weight_of_a_family():
    one, many = fuse_of("mlp", 2), fuse_of("mlp", 8)
    assert len(one.bundle.arrays) == len(many.bundle.arrays)
    args = jax.tree.leaves(many.compile().args_info)
    assert len(args) == len(many.bundle.arrays) + 8  # and one input a tenant
    constants = [i for i in instructions(many.as_text()) if i.opcode == "constant"]
    assert max((i.elements for i in constants), default=0) < 1024


def test_results_of_lanes_are_written_at_once_on_a_gpu():
    """The rows of a stack, exactly; a program for a GPU says nowhere that they do not overlap."""
    bits = jnp.arange(6, dtype=jnp.int8).reshape(3, 2)
    stacks = [jnp.arange(24.0).reshape(3, 2, 4), bits, jnp.asarray([1, 0, 1]) > 0]

    def split(*stacks):
        return by_lane([Stacked(stacks[0]), Shared(stacks[0][1]), *map(Stacked, stacks[1:])], 3, "gpu")

    for i, (first, shared, *rest) in enumerate(jax.jit(split)(*stacks)):
        assert_bitwise([first, *rest], [x[i] for x in stacks])
        assert_bitwise(shared, stacks[0][1])
    primitives = [eqn.primitive.name for eqn in J.walk(jax.make_jaxpr(split)(*stacks))]
    assert primitives.count("optimization_barrier") == 3 and primitives.count("dynamic_slice") == 9
    assert by_lane([Shared(stacks[0])], 3, "gpu") == [[stacks[0]]] * 3
