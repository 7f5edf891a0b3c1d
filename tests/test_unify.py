"""One shape for several heavy ops: what shares one, and that each op's own result lies in the padded result.

In every dimension that `contracted` does not name, the padding is NaN here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

from coalesce.heavy import heavy_op, HeavyOp
from coalesce.kernels import as_product, KERNELS
from coalesce.unify import contracted, FORMS, is_product, Unified, unify
from tests.compare import assert_bitwise, assert_same
from tests.programs import Aval, Draw, many_compiles, readable
from tests.tenants import array

LAST = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC")}


@pytest.fixture(autouse=True, scope="module")
def cheap_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with many_compiles(tmp_path_factory.mktemp("compiled")):
        yield


def op_of(call: Any, lhs: Sequence[int], rhs: Sequence[int], dtype: Any = jnp.float32) -> HeavyOp:
    (eqn,) = jax.make_jaxpr(call)(Aval(tuple(lhs), dtype), Aval(tuple(rhs), dtype)).jaxpr.eqns
    return heavy_op(eqn)


def dot(m: int, n: int, k: int, dtype: Any = jnp.float32, **options: Any) -> HeavyOp:
    return op_of(partial(lax.dot, **options), (m, k), (k, n), dtype)


def scores(b: int, m: int, n: int, k: int) -> HeavyOp:
    return op_of(partial(lax.dot_general, dimension_numbers=(((2,), (1,)), ((0,), (0,)))), (b, m, k), (b, k, n))


def conv(size: int, c: int, o: int, window: int = 3, batch: int = 1, **options: Any) -> HeavyOp:
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": LAST[2]} | options
    groups = options.get("feature_group_count", 1)
    call = partial(lax.conv_general_dilated, **options)
    return op_of(call, (batch, size, size, c), (window, window, c // groups, o))


def form_of(*ops: HeavyOp, forms: Sequence[str] = FORMS) -> str | None:
    shared = unify(ops, [1] * len(ops), forms)
    return shared and shared.form


# ---- what shares a shape -------------------------------------------------------------------------------------------


def test_equal_ops_are_not_padded():
    shared = unify([dot(2, 3, 4), dot(2, 3, 4)], [1, 2], FORMS)
    assert shared is not None
    assert shared == Unified("equal", dot(2, 3, 4))
    assert shared.waste(dot(2, 3, 4), 1) == 0


def test_dots_of_other_sizes_are_padded():
    shared = unify([dot(2, 3, 4), dot(1, 5, 2)], [1, 1], FORMS)
    assert shared is not None
    assert (shared.form, shared.op.lhs.shape, shared.op.rhs.shape, shared.op.out.shape) == (
        "padded", (2, 4), (4, 5), (2, 5),
    )  # fmt: skip
    assert (shared.op.m, shared.op.n, shared.op.k) == (2, 5, 4)
    assert shared.waste(dot(2, 3, 4), 1) == 1 - 24 / 40
    assert shared.waste(dot(1, 5, 2), 1) == 1 - 10 / 40


def test_heads_are_padded_too():
    shared = unify([scores(2, 3, 4, 5), scores(4, 3, 2, 5)], [1, 1], FORMS)
    assert shared is not None
    assert (shared.form, shared.op.batch, shared.op.n) == ("padded", 4, 4)
    assert shared.waste(scores(2, 3, 4, 5), 1) == 0.5


def test_convolutions_of_one_window_are_padded():
    shared = unify([conv(5, 2, 3), conv(4, 3, 1, batch=2)], [1, 1], FORMS)
    assert shared is not None
    assert (shared.form, shared.op.lhs.shape, shared.op.rhs.shape) == ("padded", (2, 5, 5, 3), (3, 3, 3, 3))
    assert shared.op.out.shape == (2, 5, 5, 3)


def test_depthwise_convolutions_are_padded_in_their_channels():
    shared = unify([conv(5, c, c, feature_group_count=c) for c in (2, 4)], [1, 1], FORMS)
    assert shared is not None
    assert (shared.form, shared.op.params["feature_group_count"], shared.op.rhs.shape) == ("padded", 4, (3, 3, 1, 4))
    assert shared.waste(conv(5, 2, 2, feature_group_count=2), 1) == 0.5


def test_other_windows_are_plain_products():
    ops = [conv(4, 2, 3), conv(5, 2, 3, window=2), dot(7, 3, 9)]
    shared = unify(ops, [1, 1, 2], FORMS)
    assert shared is not None
    assert (shared.form, shared.op.kind) == ("product", "dot")
    assert (shared.op.lhs.shape, shared.op.rhs.shape) == ((25, 18), (18, 3))
    assert shared.waste(ops[0], 1) == 1 - 16 / 25
    assert shared.waste(ops[2], 2) == 1 - 14 * 9 / (25 * 18)  # two lanes are rows of one problem


def test_batch_dimensions_are_problems_of_a_product():
    shared = unify([scores(6, 2, 3, 4), dot(2, 3, 4)], [1, 1], FORMS)
    assert shared is not None
    assert (shared.form, shared.op.m, shared.op.n, shared.op.k) == ("product", 2, 3, 4)
    assert shared.waste(scores(6, 2, 3, 4), 1) == 0


@pytest.mark.parametrize(
    ("ops", "form"),
    [
        ((conv(5, 2, 3), conv(5, 2, 3, window_strides=(2, 2))), "product"),
        ((conv(5, 2, 3), conv(5, 2, 3, rhs_dilation=(1, 2))), "product"),
        ((conv(4, 2, 3, padding="VALID"), conv(5, 2, 3)), "product"),
        ((conv(5, 4, 4, feature_group_count=2), conv(5, 4, 4, feature_group_count=2)), "equal"),
        ((conv(5, 4, 4, feature_group_count=2), conv(4, 4, 4, feature_group_count=2)), None),
        ((conv(5, 4, 4, feature_group_count=4), conv(5, 4, 4)), None),
        ((conv(5, 4, 8, feature_group_count=4), conv(4, 4, 8, feature_group_count=4)), None),
        ((conv(5, 4, 4, batch=2, batch_group_count=2), conv(4, 4, 4, batch=2, batch_group_count=2)), None),
        ((dot(2, 3, 0), dot(2, 3, 1)), None),
        ((dot(2, 3, 4), dot(2, 3, 4, jnp.bfloat16)), None),
        ((dot(2, 3, 4), dot(2, 3, 4, precision="highest")), None),
        ((dot(2, 3, 4, jnp.bfloat16), dot(2, 3, 4, jnp.bfloat16, preferred_element_type=jnp.float32)), None),
        ((dot(2, 3, 4), dot(2, 3, 5, preferred_element_type=jnp.float32)), "padded"),
        ((dot(2, 3, 4), scores(1, 2, 3, 4)), "product"),
    ],
)
def test_the_best_form(ops, form):
    assert form_of(*ops) == form_of(*ops[::-1]) == form


def test_only_the_forms_that_are_asked_for():
    assert form_of(dot(2, 3, 4), dot(2, 3, 4), forms=("padded",)) == "padded"
    assert form_of(dot(2, 3, 4), dot(2, 3, 5), forms=("equal",)) is None
    assert form_of(dot(2, 3, 4), dot(2, 3, 5), forms=("product",)) == "product"


# ---- any sizes -----------------------------------------------------------------------------------------------------


def drawn_dots(pick: Draw, count: int) -> list[HeavyOp]:
    b, m, k, n = (pick.integer(0, most) for most in (1, 2, 2, 2))
    ends = tuple(range(b + m, b + m + k)), tuple(range(b, b + k))
    numbers = (ends, (tuple(range(b)), tuple(range(b))))

    def drawn() -> HeavyOp:
        batch, rows, inner, columns = ([pick.integer(1, 4) for _ in range(r)] for r in (b, m, k, n))
        call = partial(lax.dot_general, dimension_numbers=numbers, precision="highest")
        return op_of(call, [*batch, *rows, *inner], [*batch, *inner, *columns])

    return [drawn() for _ in range(count)]


def drawn_convs(pick: Draw, count: int) -> list[HeavyOp]:
    rank = pick.integer(1, 2)
    window, strides, spread, holes = ([pick.integer(1, most) for _ in range(rank)] for most in (3, 2, 2, 2))
    padding = readable([(pick.integer(-1, 2), pick.integer(-1, 2)) for _ in range(rank)])
    depthwise = pick.integer(0, 3) == 0
    # The least size that the window fits into.
    reach = [(w - 1) * h + 1 for w, h in zip(window, holes, strict=True)]
    least = [max(1, -((a + b - r) // s) + 1) for r, (a, b), s in zip(reach, padding, spread, strict=True)]

    def drawn() -> HeavyOp:
        size, c, o = [n + pick.integer(0, 3) for n in least], pick.integer(1, 3), pick.integer(1, 3)
        call = partial(
            lax.conv_general_dilated, window_strides=strides, padding=padding,
            lhs_dilation=spread, rhs_dilation=holes, dimension_numbers=LAST[rank], precision="highest",
            feature_group_count=c + 1 if depthwise else 1,
        )  # fmt: skip
        if depthwise:
            return op_of(call, [pick.integer(1, 2), *size, c + 1], [*window, 1, c + 1])
        return op_of(call, [pick.integer(1, 2), *size, c], [*window, c, o])

    return [drawn() for _ in range(count)]


def one(op: HeavyOp, x: Any, w: Any) -> Any:
    """The op itself."""
    return lax.dot_general(x, w, **named(op)) if op.kind == "dot" else lax.conv_general_dilated(x, w, **op.params)


def named(op: HeavyOp) -> dict[str, Any]:
    return {k: op.params[k] for k in ("dimension_numbers", "precision", "preferred_element_type")}


def with_padding(x: Any, shape: Sequence[int], zero: Sequence[int]) -> Any:
    """`x` at the start of an array of NaN, but for zeros behind it in the dimensions `zero`."""
    whole = np.full(tuple(shape), np.nan, x.dtype)
    for dim in zero:
        whole[(slice(None),) * dim + (slice(x.shape[dim], None),)] = 0
    whole[tuple(map(slice, x.shape))] = x
    return whole


@settings(max_examples=max(5, settings().max_examples // 20))
@given(st.integers(0, 2**64 - 1), st.integers(2, 3))
def test_own_results_lie_in_the_padded_result(seed: int, count: int) -> None:
    """In every kernel that supports the padded op, each op alone in a problem of it."""
    pick = Draw(seed)
    ops = pick.choice([drawn_dots, drawn_convs])(pick, count)
    shared = unify(ops, [1] * count, ("padded",))
    assert shared is not None
    names = [name for name, kernel in KERNELS.items() if kernel.supports(shared.op)]
    left, right = contracted(shared.op)
    rng = np.random.default_rng(seed)
    xs, ws = (
        [np.asarray(array(Aval(s.shape, s.dtype), rng)) for s in side]
        for side in zip(*((o.lhs, o.rhs) for o in ops), strict=True)
    )
    whole = np.stack([with_padding(x, shared.op.lhs.shape, left) for x in xs])[:, None]
    others = np.stack([with_padding(w, shared.op.rhs.shape, right) for w in ws])

    def run(xs: Any, ws: Any, whole: Any, others: Any) -> Any:
        together = {
            name: KERNELS[name].run(shared.op, whole, jax.vmap(KERNELS[name].layout(shared.op))(others))
            for name in names
        }
        return together, [one(op, x, w) for op, x, w in zip(ops, xs, ws, strict=True)]

    together, alone = jax.jit(run)(xs, ws, whole, others)
    for name, out in together.items():
        assert out.shape[2:] == shared.op.out.shape, name
        for y, want in zip(out[:, 0], alone, strict=True):
            assert_same({name: y[tuple(map(slice, want.shape))]}, {name: want})


@settings(max_examples=max(5, settings().max_examples // 20))
@given(st.integers(0, 2**64 - 1), st.integers(1, 3), st.integers(1, 2))
def test_an_op_as_a_plain_product(seed: int, groups: int, rows: int) -> None:
    """What lies behind its own rows and columns is NaN."""
    pick = Draw(seed)
    (op,) = pick.choice([drawn_dots, drawn_convs])(pick, 1)
    if not is_product(op):
        op = conv(4, 2, 3)
    rng = np.random.default_rng(seed)
    x, w = (array(Aval(shape, jnp.float32), rng) for shape in ((groups, rows, *op.lhs.shape), (groups, *op.rhs.shape)))

    def run(x: Any, w: Any) -> Any:
        left, right = as_product.left(op, x), as_product.right(op, w)
        assert left.shape == (groups * op.batch, rows * op.m, op.k)
        assert right.shape == (groups * op.batch, op.k, op.n)
        left = jnp.pad(jnp.pad(left, ((0, 0), (0, 0), (0, 2))), ((0, 0), (0, 1), (0, 0)), constant_values=np.nan)
        right = jnp.pad(jnp.pad(right, ((0, 0), (0, 2), (0, 0))), ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)
        out = jnp.einsum("gmk,gkn->gmn", left, right, precision="highest")[:, : rows * op.m, : op.n]
        alone = [[one(op, x[g, r], w[g]) for r in range(rows)] for g in range(groups)]
        weights = [as_product.layout(op)(w[g]) for g in range(groups)] if op.batch == 1 else []
        return as_product.result(op, out, groups, rows), jnp.asarray(alone), weights, right

    got, want, weights, right = jax.jit(run)(x, w)
    assert_same(got, want)
    for g, row in enumerate(weights):
        assert_bitwise(row, right[g, : op.k, : op.n])
