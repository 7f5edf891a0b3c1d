"""Which equations run as one on padded stacks: every rule of coalesce/joint.py by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from coalesce.joint import ELEMENTWISE, joins, keeps_boxes, MOVES, moves_apart, RULES, run
from tests.programs import Aval, many_compiles
from tests.stacked import check_joint, cut, equation, stack

F32, I32, BOOL = jnp.float32, jnp.int32, jnp.bool_


@pytest.fixture(autouse=True, scope="module")
def cheap_compiles(tmp_path_factory):
    with many_compiles(tmp_path_factory.mktemp("compiled")):
        yield


def pair(fn, first, second):
    return [equation(fn, *first), equation(fn, *second)]


def pooled(window, strides=(1, 1), padding="VALID"):
    return lambda x: lax.reduce_window(x, 0.0, lax.add, window, strides, padding)


JOIN = {
    "other sizes": pair(lax.tanh, [(2, 3)], [(4, 1)]),
    "two operands": pair(lax.add, [(2, 3), (2, 3)], [(4, 2), (4, 2)]),
    "one element for all": pair(lax.mul, [(2, 3), (1, 3)], [(4, 2), (1, 2)]),
    "one element that is all of it": pair(lax.mul, [(1, 3), (1, 3)], [(4, 2), (4, 2)]),
    "one element for one": pair(lax.mul, [(1, 3), (1, 3)], [(4, 2), (1, 2)]),
    "a scalar predicate": pair(lax.select_n, [Aval((), BOOL), (2, 3), (2, 3)], [Aval((), BOOL), (4, 2), (4, 2)]),
    "scalar bounds": pair(lax.clamp, [(), (2, 3), ()], [(), (4, 2), ()]),
    "literals that differ": [equation(lambda x: x * 2.0, (2, 3)), equation(lambda x: x * 3.0, (4, 2))],
    "zeros that differ in sign": [equation(lambda x: x / 0.0, (2, 3)), equation(lambda x: x / -0.0, (4, 2))],
    "a literal that is NaN": [equation(lambda x: lax.min(x, np.nan), (2, 3)) for _ in range(2)],
    "rows repeated": pair(lambda x: lax.broadcast(x, (3,)), [(2,)], [(4,)]),
    "as often as there are rows": [
        equation(lambda x: lax.broadcast(x, (3,)), (2,)), equation(lambda x: lax.broadcast(x, (5,)), (2,)),
    ],
    "an element repeated": [
        equation(lambda x: lax.broadcast_in_dim(x, (2, 5), (0, 1)), (2, 1)),
        equation(lambda x: lax.broadcast_in_dim(x, (3, 4), (0, 1)), (3, 1)),
    ],
    "a new dimension": [
        equation(lambda x: x.reshape(2, 1, 3), (2, 3)), equation(lambda x: x.reshape(4, 1, 2), (4, 2)),
    ],
    "the outer of those that merge": [
        equation(lambda x: x.reshape(-1, 4), (2, 3, 4)), equation(lambda x: x.reshape(-1, 4), (5, 3, 4)),
    ],
    "the outer of those that split": [
        equation(lambda x: x.reshape(2, 3, 5), (6, 5)), equation(lambda x: x.reshape(4, 3, 6), (12, 6)),
    ],
    "merged and split": [
        equation(lambda x: x.reshape(4, 2), (2, 4)), equation(lambda x: x.reshape(6, 2), (3, 4)),
    ],
    "an outer one of one": [
        equation(lambda x: x.reshape(12), (1, 3, 4)), equation(lambda x: x.reshape(24), (2, 3, 4)),
    ],
    "transposed": pair(lambda x: lax.transpose(x, (1, 2, 0)), [(2, 3, 4)], [(3, 1, 5)]),
    "squeezed": pair(lambda x: lax.squeeze(x, (1,)), [(2, 1, 4)], [(3, 1, 5)]),
    "sliced where equal": pair(lambda x: lax.slice_in_dim(x, 1, 3, axis=1), [(2, 4)], [(5, 4)]),
    "sliced from another size": [
        equation(lambda x: cut(x, (1, 0), (2, 4)), (2, 4)), equation(lambda x: cut(x, (1, 0), (2, 3)), (2, 3)),
    ],
    "summed": pair(lambda x: lax.reduce_sum(x, (1,)), [(2, 3)], [(4, 2)]),
    "the product": pair(lambda x: lax.reduce_prod(x, (0,)), [(2, 3)], [(4, 2)]),
    "the largest": pair(lambda x: lax.reduce_max(x, (0, 1)), [(2, 3)], [(4, 2)]),
    "the smallest": pair(lambda x: lax.reduce_min(x, (0, 1)), [(2, 3)], [(4, 2)]),
    "all of bools": pair(lambda x: lax.reduce_and(x, (1,)), [Aval((2, 3), BOOL)], [Aval((4, 2), BOOL)]),
    "any of bools": pair(lambda x: lax.reduce_or(x, (1,)), [Aval((2, 3), BOOL)], [Aval((4, 2), BOOL)]),
    "the bits of all": pair(lambda x: lax.reduce_and(x, (1,)), [Aval((2, 3), I32)], [Aval((4, 2), I32)]),
    "the bits of any": pair(lambda x: lax.reduce_or(x, (1,)), [Aval((2, 3), I32)], [Aval((4, 2), I32)]),
    "windows along equal sizes": pair(pooled((1, 2)), [(2, 4)], [(3, 4)]),
    "equal, shapes too, without a rule": pair(lambda x: lax.cumsum(x, 1), [(2, 3)], [(2, 3)]),
    "equal windows": pair(pooled((2, 2), (2, 1), "SAME"), [(3, 4)], [(3, 4)]),
    "equal, with a literal of its own": [
        equation(lambda x: lax.pad(x, np.float32(1), [(1, 0, 0)]), (3,)),
        equation(lambda x: lax.pad(x, np.float32(2), [(1, 0, 0)]), (3,)),
    ],
    "of two results": pair(lambda x: lax.top_k(x, 2), [(2, 3)], [(2, 3)]),
}  # fmt: skip

# Each part moves by itself, and the results are stacked again.
MOVE = {
    "the inner of those that merge": [
        equation(lambda x: x.reshape(-1), (2, 3)), equation(lambda x: x.reshape(-1), (2, 4)),
    ],
    "the inner of those that split": [
        equation(lambda x: x.reshape(2, 3), (6,)), equation(lambda x: x.reshape(2, 4), (8,)),
    ],
    "merged in other ways": [
        equation(lambda x: x.reshape(6, 4), (2, 3, 4)), equation(lambda x: x.reshape(2, 12), (2, 3, 4)),
    ],
    "sliced from the start of a padded dimension": pair(lambda x: lax.slice_in_dim(x, 0, 2), [(3,)], [(4,)]),
    "sliced to the end of a padded dimension": pair(lambda x: lax.slice_in_dim(x, 1, None), [(3,)], [(4,)]),
    "every second of a padded dimension": pair(lambda x: lax.slice_in_dim(x, 0, None, 2), [(3,)], [(4,)]),
    "another slice": [equation(lambda x, n=n: lax.slice_in_dim(x, n, n + 2), (4,)) for n in (0, 1)],
    "reversed along others": [equation(lambda x, d=d: lax.rev(x, (d,)), (2, 3)) for d in (0, 1)],
    "reversed along a padded dimension": pair(lambda x: lax.rev(x, (0,)), [(2,)], [(3,)]),
    "end to end": pair(lambda x, y: lax.concatenate([x, y], 0), [(2,), (3,)], [(3,), (2,)]),
    "split at other places": [
        equation(lambda x: lax.split(x, (2, 2)), (4,)), equation(lambda x: lax.split(x, (1, 5)), (6,)),
    ],
}  # fmt: skip

APART = {
    "other primitives": [equation(lax.tanh, (2, 3)), equation(lax.sin, (2, 3))],
    "other ranks": pair(lax.tanh, [(2, 3)], [(2,)]),
    "other dtypes": pair(lax.abs, [(2, 3)], [Aval((2, 3), I32)]),
    "other parameters": [equation(lambda x, n=n: lax.integer_pow(x, n), (2, 3)) for n in (3, 4)],
    "a literal in one": [equation(lambda x: lax.mul(x, 2.0), (2,)), equation(lax.mul, (2,), ())],
    "one element for all in one, for one in the other": pair(lax.mul, [(2, 3), (1, 3)], [(4, 3), (4, 3)]),
    "repeated in one, whole in the other": [
        equation(lambda x: lax.broadcast_in_dim(x, (3, 2, 5), (1, 2)), (2, 1)),
        equation(lambda x: lax.broadcast_in_dim(x, (3, 2, 5), (1, 2)), (2, 5)),
    ],
    "repeated along other dimensions": [
        equation(lambda x: lax.broadcast_in_dim(x, (2, 3), (0,)), (2,)),
        equation(lambda x: lax.broadcast_in_dim(x, (2, 3), (1,)), (3,)),
    ],
    "another order": [equation(lambda x, p=p: lax.transpose(x, p), (2, 3, 4)) for p in ((2, 1, 0), (1, 2, 0))],
    "another dimension squeezed": [equation(lambda x, d=d: lax.squeeze(x, (d,)), (1, 1, 3)) for d in (0, 1)],
    "reduced along other dimensions": [equation(lambda x, d=d: lax.reduce_sum(x, (d,)), (3, 3)) for d in (0, 1)],
    "windows along a padded dimension": pair(pooled((1, 2)), [(2, 4)], [(2, 5)]),
    "strides along a padded dimension": pair(pooled((1, 1), (1, 2)), [(2, 4)], [(2, 5)]),
    "no rule": pair(lambda x: lax.cumsum(x, 0), [(3,)], [(4,)]),
    "a loop": pair(lambda x: lax.fori_loop(0, 3, lambda _, c: c * 2, x), [(3,)], [(3,)]),
    "a side effect": pair(lambda x: jax.debug.callback(print, x), [(3,)], [(3,)]),
}  # fmt: skip


@pytest.mark.parametrize("name", JOIN)
def test_equations_that_run_as_one(name):
    assert joins(JOIN[name]) and not moves_apart(JOIN[name])
    assert joins(JOIN[name][::-1])
    check_joint([*JOIN[name], JOIN[name][0]], [2, 1, 1])


@pytest.mark.parametrize("name", MOVE)
def test_equations_that_move_apart(name):
    assert joins(MOVE[name]) and moves_apart(MOVE[name]) and not keeps_boxes(MOVE[name])


@pytest.mark.parametrize("name", APART)
def test_equations_that_do_not(name):
    assert not joins(APART[name])
    assert not joins(APART[name][::-1])


def test_other_contexts_stay_apart():
    def marked(x):
        with set_xla_metadata(mark="1"):
            return lax.tanh(x)

    assert not joins([equation(lax.tanh, (2,)), equation(marked, (2,))])


def test_keys_stay_apart():
    """Their batching rules are not those of arrays; see passes/lane_rules.py."""
    keys = Aval((2,), jax.random.key(0).dtype)
    assert not joins([equation(jax.random.key_data, keys)] * 2)


@pytest.mark.parametrize(
    "dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.int4, jnp.uint4, jnp.uint8, I32]
)
@pytest.mark.parametrize("reduce", [lax.reduce_max, lax.reduce_min])
def test_the_largest_and_the_smallest_of_any_dtype(reduce, dtype):
    """Both ends of the dtype's range, and no infinity where it has none."""
    eqns = pair(lambda x: reduce(x, (0,)), [Aval((2,), dtype)], [Aval((3,), dtype)])
    low, high = (np.asarray(end).astype(dtype) for end in ends_of(dtype))
    for one in ([low, low], [high, high]):
        found = stack([[np.asarray(one, dtype)], [np.asarray([*one, one[0]], dtype)]], [1, 1])
        (result,) = run(eqns, [found])
        np.testing.assert_array_equal(np.asarray(result), np.asarray([one[0]] * 2, dtype))


def ends_of(dtype):
    info = jnp.finfo(dtype) if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype)
    return info.min, info.max


def test_every_rule_is_tested():
    tested = {eqn.primitive.name for eqns in [*JOIN.values(), *MOVE.values()] for eqn in eqns}
    assert tested >= MOVES
    assert set(RULES) - ELEMENTWISE - tested <= {"reduce_window_max", "reduce_window_min"}
