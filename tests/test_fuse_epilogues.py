"""fuse_epilogues: elementwise work runs in the superkernel whose result it reads, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh

import coalesce
from coalesce import jaxpr as J
from coalesce.bundle import Bundle, items, JointLoop, packs, Step
from coalesce.bundle_check import check_bundle
from coalesce.errors import IRError
from coalesce.kernels import choose
from coalesce.kernels.epilogue import on_tile, rounded, runs_on_tiles, TILEWISE
from coalesce.kernels.triton import launch
from coalesce.models import by_name
from coalesce.passes.align import align
from coalesce.passes.choose_kernels import choose_kernels
from coalesce.passes.cluster import cluster
from coalesce.passes.form_packs import form_packs
from coalesce.passes.fuse_epilogues import fuse_epilogues
from coalesce.passes.pack import pack
from tests.alone import array, check_fused
from tests.bundles import bundle_of, replanned
from tests.cases import assert_each_as_alone, assert_inputs_isolated, assert_weights_isolated, case_of, fuse, inputs_of
from tests.compare import assert_as_good
from tests.dataflow import check_plan
from tests.fixed_costs import Fixed
from tests.heavy_cases import indexed
from tests.programs import Draw, many_compiles
from tests.tenants import draw_tenants

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def planned(*tenants: Any, choice: Any = indexed, **options: Any) -> Bundle:
    return choose_kernels(form_packs(bundle_of(*tenants), **options), platform="cpu", choice=choice)


def epilogues(*tenants: Any, **options: Any) -> list[list[str]]:
    """The primitives of each pack's epilogue, in a plan and a program that are right."""
    check_fused(tenants, choose_kernel=indexed, policy="never", **options)
    bundle = fuse_epilogues(planned(*tenants, **options))
    check_plan(bundle, 0.0)
    return [[step.eqn.primitive.name for step in pack.epilogue] for pack in packs(bundle.schedule)]


def two(fn: Any, shapes: Any, *inputs: Any) -> list[Any]:
    """Two tenants of a function, with weights of their own."""

    def weights() -> Any:
        return jax.tree.map(lambda shape: array(*shape), shapes, is_leaf=lambda x: isinstance(x, tuple))

    return [(fn, weights(), tuple(array(*shape) for shape in inputs)) for _ in range(2)]


def biased(p, x):
    return lax.max(lax.dot(x, p["w"]) + lax.broadcast_in_dim(p["b"], (2, 3), (1,)), 0.0)


BIASED = {"w": (4, 3), "b": (3,)}


def block(p, x):
    """The end of a residual block: a convolution, its batch norm, the sum with the shortcut, and ReLU."""
    y = lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=DIMENSIONS)
    y = y * p["scale"].reshape(1, 1, 1, -1) + p["offset"].reshape(1, 1, 1, -1)
    return jax.nn.relu(y + x)


BLOCK = {"w": (3, 3, 4, 4), "scale": (4,), "offset": (4,)}


def test_a_dense_layer(golden):
    golden(replanned(fuse_epilogues, planned(*two(biased, BIASED, (2, 4)))))


def test_a_residual_block(golden):
    golden(replanned(fuse_epilogues, planned(*two(block, BLOCK, (1, 5, 5, 4)))))


def test_layers_are_right():
    assert epilogues(*two(biased, BIASED, (2, 4))) == [["broadcast_in_dim", "add", "max"]]
    assert epilogues(*two(block, BLOCK, (1, 5, 5, 4))) == [["mul", "add", "add", "max"]]


def test_lanes_that_share_weights_keep_their_own_biases():
    """One problem of two lanes: each row of a tile has its lane's bias."""
    w = array(4, 3)
    tenants = [(biased, {"w": w, "b": array(3)}, (array(2, 4),)) for _ in range(3)]
    assert epilogues(*tenants) == [["broadcast_in_dim", "add", "max"]]


def test_heads_with_a_bias_of_two_dimensions():
    """A vector over the columns is one, whatever its shape; one over heads alone is none."""

    def heads(p, x, mask):
        q = lax.dot_general(x, p["w"], (((1,), (0,)), ((), ()))) + p["b"][None]
        scores = lax.dot_general(q, q, (((2,), (2,)), ((1,), (1,))))
        return scores * 0.5 + mask, q * p["by_head"][None, :, None]

    tenants = two(heads, {"w": (4, 2, 3), "b": (2, 3), "by_head": (2,)}, (5, 4), (2, 5, 5))
    assert epilogues(*tenants) == [["add"], ["mul", "add"]]


def test_a_mask():
    """Bools are read as the other operands are."""

    def run(p, x, mask):
        return jnp.where(mask > 0, lax.dot(x, p), -1e9)

    assert epilogues(*two(run, (4, 3), (2, 4), (2, 3))) == [["broadcast_in_dim", "select_n"]]


def test_a_value_that_others_read_ends_the_tail():
    def run(p, x):
        y = lax.dot(x, p) + 1.0
        return lax.exp(y), y.sum(0)

    assert epilogues(*two(run, (4, 3), (2, 4))) == [["add"]]


def test_a_value_read_twice_inside_does_not():
    assert epilogues(*two(lambda p, x: jax.nn.silu(lax.dot(x, p)), (4, 3), (2, 4))) == [["logistic", "mul"]]


def test_what_is_not_there_yet_cannot_be_read():
    """The sum runs in the second product, which finds the first one's result; not in the first."""
    run = lambda p, x: lax.tanh(lax.dot(x, p["a"]) + lax.dot(lax.sin(x), p["b"]))  # noqa: E731
    assert sorted(epilogues(*two(run, {"a": (4, 3), "b": (4, 3)}, (2, 4)))) == [[], ["add", "tanh"]]


@pytest.mark.parametrize(
    "tail",
    [lambda y: y.sum(0), lambda y: lax.cumsum(y), lambda y: y.astype(jnp.int32), lambda y: y > 0, lambda y: y.T + 1.0],
    ids=["reduction", "cumsum", "integers", "bools", "transpose"],
)
def test_what_a_tile_cannot_do(tail):
    assert epilogues(*two(lambda p, x: tail(lax.dot(x, p)), (4, 3), (2, 4))) == [[]]


def test_a_result_that_is_an_output_too():
    assert epilogues(*two(lambda p, x: (y := lax.dot(x, p), y + 1.0), (4, 3), (2, 4))) == [[]]


def test_inside_a_scan():
    def run(p, x):
        return lax.scan(lambda c, _: (lax.tanh(lax.dot(c, p["w"]) + p["b"][None]), c.sum()), x, None, 3)

    assert epilogues(*two(run, {"w": (4, 4), "b": (4,)}, (2, 4))) == [["add", "tanh"]]


def scans(length: int, head: bool, size: int = 4) -> Any:
    """A tenant of a recurrence, with or without a product of its own in each step."""

    def run(p, xs, x):
        def step(c, x):
            c = lax.tanh(lax.dot(c, p["w"]))
            return c, jnp.maximum(lax.dot(c, p["v"]) + p["b"][None], 0.0) + x if head else x

        return lax.scan(step, x, xs)

    params = {"w": array(size, size), "v": array(size, 6), "b": array(6)}
    return run, params, (array(length, 2, 6), array(2, size))


def in_scans(bundle: Bundle) -> list[list[str]]:
    """As `epilogues`, of the packs in scans that run as one."""
    found = [pack for loop in items(bundle.schedule) if isinstance(loop, JointLoop) for pack in packs(loop.body)]
    return [[step.eqn.primitive.name for step in pack.epilogue] for pack in found]


def test_inside_scans_that_run_as_one(golden):
    """What runs for one of the families there, as in a loop of its own; not what runs for several."""
    bundle = bundle_of(scans(3, True), scans(5, False))
    bundle = align(cluster(form_packs(bundle), waste_bound=0.6), costs=Fixed(), policy="always", waste_bound=0.6)
    golden(replanned(fuse_epilogues, choose_kernels(pack(bundle), platform="cpu", choice=indexed)))


@pytest.mark.parametrize("lengths", [(3, 3), (2, 5), (5, 2)])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.once
def test_scans_that_run_as_one_are_right(lengths, count):
    one, other = lengths
    tenants = [scans(one, True)] * count + [scans(other, False)] * count
    fused = check_fused(tenants, choose_kernel=indexed, policy="always", waste_bound=0.6)
    assert sorted(in_scans(fused.bundle)) == [[], ["add", "max", "add"]]


def test_other_kernels_have_none():
    bundle = planned(*two(biased, BIASED, (2, 4)), choice=choose)
    assert fuse_epilogues(bundle) is bundle


def test_an_epilogue_that_hides_what_others_read_is_refused():
    """By the check that runs after every pass."""

    def run(p, x):
        y = lax.dot(x, p)
        return y, y + 1.0

    def twice(p, x):
        y = lax.dot(x, p)
        return lax.exp(y) + lax.sin(y)

    for fn, moved, message in [(run, "add", "a result of the program is inside"), (twice, "exp", "runs before what")]:
        bundle = planned(*two(fn, (4, 3), (2, 4)))
        pack, *rest = bundle.schedule
        (step,) = [item for item in rest if isinstance(item, Step) and item.eqn.primitive.name == moved]
        pack = replace(pack, epilogue=(step,), results=tuple(step.eqn.outvars))
        schedule = (pack, *(item for item in rest if item is not step))
        with pytest.raises(IRError, match=message):
            check_bundle(replace(bundle, schedule=schedule))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        # many kernels that are interpreted, each of a kind that tests above run on both interpreters
        pytest.param("resnet18", {"image_size": 16, "width": 8, "stages": (1, 1)}, marks=pytest.mark.once),
        ("lstm", {"steps": 2, "hidden": 16}),
    ],
)
def test_models(name, fields):
    model = by_name(name, **fields)
    tenants = [(model.apply, model.init(jax.random.key(i)), model.example(jax.random.key(i))) for i in range(2)]
    assert any(pack.epilogue for pack in packs(check_fused(tenants, choose_kernel=indexed).bundle.schedule))


@pytest.fixture(scope="module")
def cheap_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with many_compiles(tmp_path_factory.mktemp("compiled")):
        yield


@settings(max_examples=max(5, settings().max_examples // 10))  # interpreted kernels take their time
@given(length=st.integers(1, 4), seed=st.integers(0, 2**64 - 1))
def test_each_tenant_gets_what_it_gets_alone(cheap_compiles: None, length: int, seed: int) -> None:
    pick = Draw(seed)
    dtype = pick.choice([jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16])
    case = case_of(pick, draw_tenants(pick, length, 1, dtype), choose_kernel=indexed)
    program = fuse(case.found, case.options)
    results = program(inputs_of(case.found))
    assert_each_as_alone(case.found, results, dtype)
    assert_inputs_isolated(case, program, results)
    assert_weights_isolated(case, program, results)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("primitive", [lax.max_p, lax.min_p])
def test_the_larger_of_a_nan_is_a_nan(primitive, dtype):
    """A poisoned value must not be mended on its way, whatever the GPU's own instruction makes of it."""
    struct = jax.ShapeDtypeStruct((4,), dtype)
    (eqn,) = jax.make_jaxpr(primitive.bind)(struct, struct).jaxpr.eqns
    a, b = jnp.asarray([1, jnp.nan, 2, jnp.nan], dtype), jnp.asarray([2, 1, jnp.nan, jnp.nan], dtype)
    got, want = (np.asarray(x, np.float32) for x in (on_tile(eqn, [a, b]), primitive.bind(a, b)))
    np.testing.assert_array_equal(got, want)
    text = str(jax.make_jaxpr(lambda a, b: on_tile(eqn, [a, b]))(a, b))
    assert f" {primitive.name} " not in text  # Pallas' lowering of it for Triton drops the NaN


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("primitive", [lax.erf_p, lax.erfc_p])
def test_error_functions(primitive, dtype):
    """As XLA's, to a rounding of the result, however small it is; at the ends too."""
    x = jnp.asarray([*np.linspace(-6, 6, 1001), 1e-20, -np.inf, np.inf, np.nan], dtype)
    (eqn,) = jax.make_jaxpr(primitive.bind)(x).jaxpr.eqns
    got, want = (np.asarray(y, np.float64) for y in (on_tile(eqn, [x]), primitive.bind(x)))
    least = float(jnp.finfo(dtype).tiny)
    np.testing.assert_allclose(got, want, rtol=max(float(jnp.finfo(dtype).eps), 5e-6), atol=least)


def nearest(method: lax.RoundingMethod) -> Any:
    return lambda x: lax.round(x, method)


ONE = {
    name: getattr(lax, name)
    for name in """abs acos acosh asin asinh atan atanh cbrt ceil cos cosh erf erfc exp exp2 expm1 floor is_finite log
    log1p logistic neg rsqrt sign sin sinh sqrt square tan tanh""".split()
}
TWO = {name: getattr(lax, name) for name in "add atan2 div eq ge gt le lt max min mul ne pow sub".split()}
OTHERS = {
    "and": lambda x: (x > 0) & (x < 1),
    "or": lambda x: (x > 1) | ~(x > -1),
    "clamp": lambda x: lax.clamp(jnp.asarray(-0.5, x.dtype), x, jnp.asarray(1.5, x.dtype)),
    "convert_element_type": lambda x: x.astype(jnp.float32),
    "integer_pow": lambda x: lax.integer_pow(x, 3),
    "round": nearest(lax.RoundingMethod.TO_NEAREST_EVEN),
    "round away": nearest(lax.RoundingMethod.AWAY_FROM_ZERO),
    "select_n": lambda x: lax.select(x > 0, x, 2 * x),
}
POINTS = [*np.linspace(-3, 3, 25), 0.49999997, -0.0, 1e-4, 7.5, -8.5, np.inf, -np.inf, np.nan]  # halves among them


def as_on_tiles(f: Any, *operands: Any) -> Any:
    jaxpr = jax.make_jaxpr(f)(*operands).jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.invars, operands, strict=True))
    for eqn in jaxpr.eqns:
        assert runs_on_tiles(eqn), eqn
        values[eqn.outvars[0]] = on_tile(eqn, [a.val if isinstance(a, J.Literal) else values[a] for a in eqn.invars])
    return values[jaxpr.outvars[0]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_operation_is_what_it_is_elsewhere(dtype):
    x = jnp.asarray(POINTS, dtype)
    assert {name.split(" ")[0] for name in TWO | ONE | OTHERS} | {"not"} == TILEWISE

    def every(how: Any) -> Any:
        one = {name: how(f, x) for name, f in (ONE | OTHERS).items()}
        return one | {name: how(f, x, x[::-1]) for name, f in TWO.items()}

    def in_float32(f: Any, *operands: Any) -> Any:
        return f(*(z.astype(jnp.float32) for z in operands)).astype(jax.eval_shape(f, *operands).dtype)

    got, want = every(as_on_tiles), every(in_float32)
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        pair = (np.asarray(y[name], np.float64) for y in (got, want))
        np.testing.assert_allclose(*pair, rtol=max(1e-6, 1.01 * float(jnp.finfo(dtype).eps)), atol=1e-7, err_msg=name)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # by JAX 0.11 and newer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_operation_has_code_for_a_gpu(dtype):
    """Lowered on a machine without one."""

    def kernel(x_ref: Any, y_ref: Any, *results: Any) -> None:
        x, y = x_ref[...], y_ref[...]
        done = [*(as_on_tiles(f, x, y) for f in TWO.values()), *(as_on_tiles(f, x) for f in (ONE | OTHERS).values())]
        for result, value in zip(results, done, strict=True):
            result[...] = jnp.where(value, 1.0, 0.0) if value.dtype == bool else value.astype(jnp.float32)

    outs = [jax.ShapeDtypeStruct((16, 16), jnp.float32)] * len(TWO | ONE | OTHERS)
    run = jax.jit(lambda x, y: launch(kernel, (1,), outs, [x, y], name="all", warps=4, stages=1))
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = run.trace(*[jax.ShapeDtypeStruct((16, 16), dtype)] * 2)
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@__gpu$xla.gpu.triton(") == 1


def test_numbers_move_along():
    """One of the program, which both layers read, and one that each tenant has learnt."""

    def run(p, x):
        for w in p["w"]:
            y = x @ w
            x = jnp.where(y > 0, y, p["slope"] * y) + jnp.where(y > 1, 0.25, y)
        return x

    tail = ["mul", "gt", "select_n", "gt", "broadcast_in_dim", "select_n", "add"]
    found = epilogues(*two(run, {"w": [(4, 4), (4, 4)], "slope": ()}, (2, 4)))
    assert [sorted(names) for names in found] == [sorted(tail)] * 2


def activations(p: Any, x: Any) -> Any:
    for w, act in zip(p, ACTIVATIONS, strict=True):
        x = act(x @ w)
    return x


ACTIVATIONS = (
    *(jax.nn.celu, jax.nn.elu, jax.nn.gelu, jax.nn.hard_sigmoid, jax.nn.hard_swish, jax.nn.hard_tanh),
    *(jax.nn.leaky_relu, jax.nn.log_sigmoid, jax.nn.mish, jax.nn.relu6, jax.nn.selu, jax.nn.sigmoid, jax.nn.silu),
    *(jax.nn.soft_sign, jax.nn.softplus, jax.nn.sparse_plus, jax.nn.squareplus),
    *(lambda x: jax.nn.gelu(x, approximate=False), lambda x: lax.clamp(-1.0, x, 1.0)),
)


def test_activations_run_in_the_kernel():
    """All that jax.nn has: nothing is left between the products."""
    tenants = two(activations, [(8, 8)] * len(ACTIVATIONS), (4, 8))
    check_fused(tenants, choose_kernel=indexed, policy="never")
    assert {type(item).__name__ for item in fuse_epilogues(planned(*tenants)).schedule} == {"Pack"}


@pytest.mark.parametrize("power", [-2, 1, 2, 3, 5, 6])
def test_powers_are_products(power):
    x = jnp.asarray([-1.5, 0.0, 2.0, jnp.nan], jnp.float32)
    (eqn,) = jax.make_jaxpr(lambda x: lax.integer_pow_p.bind(x, y=power))(x).jaxpr.eqns
    np.testing.assert_allclose(on_tile(eqn, [x]), lax.integer_pow_p.bind(x, y=power), rtol=1e-6)
    text = str(jax.make_jaxpr(lambda x: on_tile(eqn, [x]))(x))
    assert ("integer_pow" in text) == (power < 2)


def test_a_gelu_of_16_bits_runs_in_the_kernel():
    def dense(p, x):
        return jax.nn.gelu(x @ p["w"] + p["b"][None], approximate=False)

    params = [{"w": array(8, 8).astype(jnp.bfloat16), "b": array(8).astype(jnp.bfloat16)} for _ in range(2)]
    inputs = [(array(4, 8).astype(jnp.bfloat16),) for _ in params]
    programs = [coalesce.trace(dense, p, *x, name=f"t{i}") for i, (p, x) in enumerate(zip(params, inputs, strict=True))]
    fused = coalesce.fuse(programs, choose_kernel=indexed)
    (pack,) = packs(fused.bundle.schedule)
    assert "erfc" in [step.eqn.primitive.name for step in pack.epilogue]
    for got, p, x in zip(fused(inputs), params, inputs, strict=True):
        wide = dense(*jax.tree.map(lambda v: v.astype(jnp.float32), (p, *x)))
        assert_as_good(got, jax.jit(dense)(p, *x), wide, [False])


def test_a_tail_does_not_end_with_a_cast_that_widens():
    """The readers of what the last product leaves cast it, and half as much is written; one within a tail stays."""

    def block(p, x):
        y = (x @ p).astype(jnp.float32) * 2
        y = y.astype(jnp.bfloat16) + x
        return jnp.sum(y.astype(jnp.float32), 1)

    tenants = [(block, array(8, 8).astype(jnp.bfloat16), (array(4, 8).astype(jnp.bfloat16),)) for _ in range(2)]
    programs = [coalesce.trace(fn, p, *x, name=f"t{i}") for i, (fn, p, x) in enumerate(tenants)]
    (pack,) = packs(coalesce.fuse(programs, choose_kernel=indexed).bundle.schedule)
    steps = [step.eqn.primitive.name for step in pack.epilogue]
    assert steps == ["convert_element_type", "mul", "convert_element_type", "add"]


@pytest.mark.parametrize("to_even", [True, False])
def test_rounding_keeps_the_sign_of_zero(to_even):
    x = jnp.array([-0.0, 0.0, -0.3, 0.3, -jnp.inf, -2.5], jnp.float32)
    np.testing.assert_array_equal(np.signbit(rounded(x, to_even)), np.signbit(x))
    np.testing.assert_array_equal(rounded(x, to_even)[4:], [-np.inf, -2.0 if to_even else -3.0])
