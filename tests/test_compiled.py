"""What XLA makes of a fused program: weights are arguments, read in place."""

from math import prod

import jax
import pytest

import coalesce
from coalesce.models import by_name
from tests.hlo import instructions, moves_of_size

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


def test_the_reader_of_hlo_sees_a_move():
    """The check above can fail: stacking weights on each call is seen."""
    structs = [jax.ShapeDtypeStruct((64, 64), "float32")] * 2
    text = jax.jit(lambda a, b: jax.numpy.stack([a, b]) * 2).lower(*structs).compile().as_text() or ""
    assert moves_of_size(text, 64 * 64)
    assert any(i.opcode == "parameter" for i in instructions(text))


def test_weights_are_arguments_one_array_a_weight_of_a_family():
    one, many = fuse_of("mlp", 2), fuse_of("mlp", 8)
    assert len(one.bundle.arrays) == len(many.bundle.arrays)
    args = jax.tree.leaves(many.compile().args_info)
    assert len(args) == len(many.bundle.arrays) + 8  # and one input a tenant
    constants = [i for i in instructions(many.as_text()) if i.opcode == "constant"]
    assert max((i.elements for i in constants), default=0) < 1024
