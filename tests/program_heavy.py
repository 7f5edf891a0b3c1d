"""Dots and convolutions with random dimensions, strides, padding, dilation and groups. See tests/programs.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from tests.programs import Aval, Draw, fit, kind_of, Op, readable, Scope

SIDES = ["weight right", "weight left", "no weight", "constant"]
HIGHEST = lax.Precision.HIGHEST


class Other(NamedTuple):
    """The second operand of a heavy op: what it is read from, weights, and how it comes from both."""

    reads: tuple[int, ...]
    weights: tuple[Aval, ...]
    get: Callable[[Any, Any, Any], Any]  # (weights, what is read, dtype)


def other_operand(draw: Draw, scope: Scope, aval: Aval, side: str) -> Other:
    if side == "constant":
        return Other((), (), lambda w, read, dtype: fit(jnp.arange(5) - 2, Aval(aval.shape, dtype)))
    if side != "no weight":
        return Other((), (aval,), lambda w, read, dtype: w[0])
    j = draw.choice([j for j in scope.candidates("fi") if scope.values[j].dtype == aval.dtype])
    return Other((j,), (), lambda w, read, dtype: fit(read[0], Aval(aval.shape, dtype)))


def accumulation(draw: Draw, aval: Aval) -> Any:
    """preferred_element_type"""
    return jnp.float32 if kind_of(aval) == "f" and draw.flag() else None


def dot(draw: Draw, scope: Scope, i: int) -> Op:
    """Any number of batch and contracting dimensions, at any positions of either side."""
    x = scope.values[i]
    dims = range(len(x.shape))
    role = [draw.choice(["contract", "free", "batch"]) for _ in dims]
    xc = draw.shuffled([d for d in dims if role[d] == "contract"])
    xb = draw.shuffled([d for d in dims if role[d] == "batch"])
    free = [("free", draw.integer(1, 6)) for _ in range(draw.integer(0, 2))]
    order = draw.shuffled([*(("like", d) for d in [*xb, *xc]), *free])
    shape = tuple(n if part == "free" else x.shape[n] for part, n in order)
    yc, yb = ([order.index(("like", d)) for d in ds] for ds in (xc, xb))
    side = draw.choice(SIDES)
    other = other_operand(draw, scope, Aval(shape, x.dtype), side)
    wide = accumulation(draw, x)

    def apply(w: Any, v: Any, *read: Any) -> Any:
        y = other.get(w, read, v.dtype)
        if side == "weight left":
            return lax.dot_general(y, v, ((yc, xc), (yb, xb)), HIGHEST, wide).astype(v.dtype)
        return lax.dot_general(v, y, ((xc, yc), (xb, yb)), HIGHEST, wide).astype(v.dtype)

    return Op(f"dot {side}", (i, *other.reads), other.weights, apply, exact=kind_of(x) == "i")


def conv(draw: Draw, scope: Scope, i: int) -> Op:
    """One to three spatial dimensions, with every parameter that a convolution has."""
    x = scope.values[i]
    shape = x.shape
    if not 3 <= len(shape) <= 5:
        spatial = draw.integer(1, 3)
        shape = tuple(draw.integer(1, 3 if spatial == 3 else 5) for _ in range(spatial + 2))
    rank = len(shape) - 2

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.integer(low, high) for _ in range(rank))

    lhs_spec, rhs_spec, out_spec = (tuple(draw.shuffled(range(rank + 2))) for _ in range(3))
    n, c = shape[lhs_spec[0]], shape[lhs_spec[1]]
    groups = draw.choice([g for g in range(1, c + 1) if c % g == 0])
    batch_groups = n if groups == 1 and draw.integer(0, 7) == 7 else 1  # rare in practice
    kernel, strides, rhs_dilation = each(1, 3), each(1, 3), each(1, 2)
    if set(kernel) == {1}:
        out_spec = in_order(lhs_spec, out_spec[1])
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, rhs_dilation, strict=True)]
    lhs_dilation = (1,) * rank
    padding: Any = draw.choice([None, None, "SAME", "VALID"])
    if padding is None:
        lhs_dilation, low, high = each(1, 2), each(-1, 2), each(-1, 2)
        padding = list(zip(low, high, strict=True))
    if padding != "SAME":  # where the window does not fit, more padding on the right lets it
        given = [(0, 0)] * rank if padding == "VALID" else padding
        held = [(shape[d] - 1) * dilation + 1 for d, dilation in zip(lhs_spec[2:], lhs_dilation, strict=True)]
        short = [max(0, r - h - lo - hi) for r, h, (lo, hi) in zip(reach, held, given, strict=True)]
        if any(short):
            padding = [(lo, hi + more) for (lo, hi), more in zip(given, short, strict=True)]
    if not isinstance(padding, str):
        padding = readable(padding)
    rhs = [0] * (rank + 2)
    for d, size in zip(rhs_spec, (groups * batch_groups * draw.integer(1, 3), c // groups, *kernel), strict=True):
        rhs[d] = size
    side = draw.choice(SIDES[:1] * 3 + SIDES)
    left, right = shape, tuple(rhs)
    other = other_operand(draw, scope, Aval(left if side == "weight left" else right, x.dtype), side)
    params = {
        "window_strides": strides, "padding": padding, "lhs_dilation": lhs_dilation, "rhs_dilation": rhs_dilation,
        "dimension_numbers": lax.ConvDimensionNumbers(lhs_spec, rhs_spec, out_spec), "feature_group_count": groups,
        "batch_group_count": batch_groups, "precision": HIGHEST, "preferred_element_type": accumulation(draw, x),
    }  # fmt: skip

    def apply(w: Any, v: Any, *read: Any) -> Any:
        a, b = v, other.get(w, read, v.dtype)
        if side == "weight left":
            a, b = b, a
        a, b = fit(a, Aval(left, v.dtype)), fit(b, Aval(right, v.dtype))
        return lax.conv_general_dilated(a, b, **params).astype(v.dtype)

    return Op(f"conv{rank} {side} g{groups}", (i, *other.reads), other.weights, apply)


def in_order(lhs_spec: tuple[int, ...], feature: int) -> tuple[int, ...]:
    """A result's dimensions with batch and space in the operand's order, and its features at `feature`.

    In regions XLA's CPU backend takes a 1x1 convolution for a dot, and then leaves any other order out (JAX 0.10).
    """
    held = sorted(d for d in lhs_spec if d != lhs_spec[1])
    free = [d for d in range(len(lhs_spec)) if d != feature]
    place = dict(zip(held, free, strict=True)) | {lhs_spec[1]: feature}
    return tuple(place[d] for d in lhs_spec)


def attention(draw: Draw, scope: Scope, i: int) -> Op:
    """One head over the leading dimension: three independent equal dots, then two of activations."""
    x = scope.values[i]
    d = x.shape[-1] if x.shape else 1
    weight = Aval((d, draw.integer(1, 4)), x.dtype)

    def apply(w: Any, v: Any) -> Any:
        v = v.reshape(-1, d)
        q, k, u = (jnp.dot(v, m, precision=HIGHEST) for m in w)
        scores = jnp.tanh(jnp.dot(q, k.T, precision=HIGHEST))
        return jnp.dot(scores, u, precision=HIGHEST) / v.shape[0]

    return Op("attention", (i,), (weight,) * 3, apply)


def tied(draw: Draw, scope: Scope, i: int) -> Op:
    """An embedding table that is the output layer too: a weight that a gather and a dot read."""
    n = draw.integer(1, 5)
    table = Aval((n, draw.integer(1, 4)), scope.dtype)

    def apply(w: Any, v: Any) -> Any:
        return jnp.dot(jnp.take(w[0], v % n, axis=0, mode="clip"), w[0].T, precision=HIGHEST)

    return Op("tied", (i,), (table,), apply)


def outer(draw: Draw, scope: Scope, i: int) -> Op:
    """A dot of two weights whose product is larger than both."""
    x = scope.values[i]
    n, m = draw.integer(2, 5), draw.integer(2, 5)
    weights = Aval((n, 1), x.dtype), Aval((1, m), x.dtype)
    return Op("outer", (i,), weights, lambda w, v: fit(v, Aval((n, m), v.dtype)) + jnp.dot(*w, precision=HIGHEST))


HEAVY = {"f": (dot, dot, conv, conv, conv, attention, outer), "i": (dot, tied), "b": ()}
