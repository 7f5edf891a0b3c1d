"""Dots and convolutions with random dimensions, strides, padding, dilation and groups. See tests/programs.py."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax

from tests.programs import Aval, fit, kind_of, Op, Scope

SIDES = ["weight right", "weight left", "no weight"]


def other_operand(draw: Any, scope: Scope, i: int, aval: Aval, side: str) -> tuple[tuple[int, ...], tuple[Aval, ...], Any]:
    """The second operand of a heavy op: (what the op reads, its weights, how to get it from them)."""
    if side != "no weight":
        return (i,), (aval,), lambda w, rest, dtype: w[0]
    j = draw(st.sampled_from([j for j in scope.candidates("fi") if scope.values[j].dtype == aval.dtype]))
    return (i, j), (), lambda w, rest, dtype: fit(rest[0], Aval(aval.shape, dtype))


def dot(draw: Any, scope: Scope, i: int) -> Op:
    """Any number of batch and contracting dimensions, at any positions of either side."""
    x = scope.values[i]
    rank = len(x.shape)
    role = [draw(st.sampled_from(["free", "contract", "batch"])) for _ in range(rank)]
    if rank and draw(st.booleans()):
        role[-1] = "contract"
    xc = draw(st.permutations([d for d in range(rank) if role[d] == "contract"]))
    xb = draw(st.permutations([d for d in range(rank) if role[d] == "batch"]))
    free = draw(st.lists(st.integers(1, 6), max_size=2))
    parts = [("b", d) for d in xb] + [("c", d) for d in xc] + [("f", n) for n in free]
    order = draw(st.permutations(parts))
    shape = tuple(value if part == "f" else x.shape[value] for part, value in order)
    yc, yb = [order.index(("c", d)) for d in xc], [order.index(("b", d)) for d in xb]
    side = draw(st.sampled_from(SIDES))
    reads, weights, get = other_operand(draw, scope, i, Aval(shape, x.dtype), side)
    wide = kind_of(x) == "f" and draw(st.booleans())
    kind = jnp.float32 if wide else None

    def apply(w: Any, v: Any, *rest: Any) -> Any:
        y = get(w, rest, v.dtype)
        if side == "weight left":
            out = lax.dot_general(y, v, ((yc, xc), (yb, xb)), lax.Precision.HIGHEST, kind)
        else:
            out = lax.dot_general(v, y, ((xc, yc), (xb, yb)), lax.Precision.HIGHEST, kind)
        return out.astype(v.dtype)

    return Op(f"dot {side}", reads, weights, apply, exact=kind_of(x) == "i")


def conv(draw: Any, scope: Scope, i: int) -> Op:
    """One to three spatial dimensions, with every parameter that a convolution has."""
    x = scope.values[i]
    shape = x.shape
    if not 3 <= len(shape) <= 5:
        spatial = draw(st.integers(1, 3))
        shape = tuple(draw(st.integers(1, 5 if spatial < 3 else 3)) for _ in range(spatial + 2))
    rank = len(shape) - 2
    lhs_spec = tuple(draw(st.permutations(range(rank + 2))))
    c, n = shape[lhs_spec[1]], shape[lhs_spec[0]]
    size = [shape[d] for d in lhs_spec[2:]]
    groups = draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    batch_groups = draw(st.sampled_from([g for g in range(1, n + 1) if n % g == 0])) if groups == 1 else 1
    if draw(st.integers(0, 7)):
        batch_groups = 1  # rare in practice, so mostly left out
    features = groups * batch_groups * draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    strides, rhs_dilation, lhs_dilation = (tuple(draw(st.integers(1, m)) for _ in range(rank)) for m in (3, 2, 2))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, rhs_dilation, strict=True)]
    padding: Any = [(draw(st.integers(-1, 2)), draw(st.integers(-1, 2))) for _ in range(rank)]
    choice = draw(st.sampled_from(["SAME", "VALID", "pairs"]))
    if choice != "pairs":
        lhs_dilation, padding = (1,) * rank, choice
    if choice != "SAME" and any(out_size(*d) < 1 for d in zip(size, lhs_dilation, reach, padding if choice == "pairs" else [
            (0, 0)] * rank, strict=True)):  # fmt: skip
        lhs_dilation, padding = (1,) * rank, [(r - 1, r) for r in reach]
    rhs_spec, out_spec = (tuple(draw(st.permutations(range(rank + 2)))) for _ in range(2))
    rhs = [0] * (rank + 2)
    for d, s in zip(rhs_spec, (features, c // groups, *kernel), strict=True):
        rhs[d] = s
    side = draw(st.sampled_from(SIDES[:1] * 3 + SIDES))
    left, right = Aval(shape, x.dtype), Aval(tuple(rhs), x.dtype)
    reads, weights, get = other_operand(draw, scope, i, left if side == "weight left" else right, side)
    numbers = lax.ConvDimensionNumbers(lhs_spec, rhs_spec, out_spec)
    kind = jnp.float32 if draw(st.booleans()) else None

    def apply(w: Any, v: Any, *rest: Any) -> Any:
        y = get(w, rest, v.dtype)
        a, b = (y, fit(v, Aval(right.shape, v.dtype))) if side == "weight left" else (fit(v, Aval(shape, v.dtype)), y)
        out = lax.conv_general_dilated(a, b, strides, padding, lhs_dilation, rhs_dilation, numbers, groups, batch_groups,
                                       lax.Precision.HIGHEST, kind)  # fmt: skip
        return out.astype(v.dtype)

    return Op(f"conv{rank} {side} g{groups}", reads, weights, apply)


def out_size(size: int, dilation: int, reach: int, padding: tuple[int, int]) -> int:
    """Positions of a window along one dimension at stride 1."""
    return (size - 1) * dilation + 1 + sum(padding) - reach + 1


def attention(draw: Any, scope: Scope, i: int) -> Op:
    """One head over the leading dimension: three independent equal dots, then two of activations."""
    x = scope.values[i]
    d = x.shape[-1] if x.shape else 1
    weight = Aval((d, draw(st.integers(1, 4))), x.dtype)

    def apply(w: Any, v: Any) -> Any:
        v = v.reshape(-1, d)
        q, k, u = (jnp.dot(v, m, precision="highest") for m in w)
        scores = jnp.tanh(jnp.dot(q, k.T, precision="highest"))
        return jnp.dot(scores, u, precision="highest") / v.shape[0]

    return Op("attention", (i,), (weight,) * 3, apply)


HEAVY = {"f": (dot, dot, conv, conv, conv, attention), "i": (dot,), "b": ()}
