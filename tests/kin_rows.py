"""Layers on rows, [n, d] floats. See tests/kin.py.

Each rule `(kin, own, scope, i) -> Op` reads value `i`; `kin` decides what all programs have in common.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.programs import Aval, Draw, fit, Op, Scope

HIGHEST = lax.Precision.HIGHEST


def near(kin: Draw, own: Draw, most: int) -> int:
    """A size that all programs have, or nearly: one more, one less, or a single element."""
    size = kin.integer(1, most)
    return own.choice([size, size, size, size + 1, max(1, size - 1), 1])


def literal(kin: Draw, own: Draw) -> float:
    """A number that all programs have, or one of a program's own."""
    common = kin.choice([0.5, 1.0, 1.5])
    return own.choice([common, common, 0.75])


def product(a: Any, b: Any) -> Any:
    return lax.dot(a, b, precision=HIGHEST)


def dense(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    n, d = scope.values[i].shape
    e, bias, turned = near(kin, own, 5), kin.flag(), kin.integer(0, 3) == 0
    weights = [Aval((e, d) if turned else (d, e), scope.dtype), *[Aval((e,), scope.dtype)] * bias]
    squash = kin.choice([jnp.tanh, jnp.sin, jax.nn.relu, jax.nn.sigmoid, lambda x: x])

    def apply(w: Any, x: Any) -> Any:
        y = product(x, w[0].T if turned else w[0])
        return squash(y + w[1][None] if bias else y)

    return Op("dense", (i,), tuple(weights), apply)


def activated(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    c, kind = literal(kin, own), kin.integer(0, 5)

    def apply(w: Any, x: Any) -> Any:
        return [
            lambda: jnp.tanh(x * c),
            lambda: jnp.maximum(x, -c),
            lambda: lax.clamp(x.dtype.type(-c), x, x.dtype.type(c)),
            lambda: x / (1 + jnp.exp(-c * x)),
            lambda: lax.integer_pow(jnp.sin(x), 3) + c,
            lambda: jnp.logaddexp(x, jnp.full_like(x, c)),
        ][kind]()

    return Op(f"activated{kind}", (i,), (), apply)


def treacherous(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    """What a zero or a garbage in the padding turns into NaN or infinity."""
    d = scope.values[i].shape[1]
    kind, c = kin.integer(0, 5), literal(kin, own)

    def apply(w: Any, x: Any) -> Any:
        gain, t = (w[0] * w[0] + c)[None], jnp.tanh(x)  # of weights alone: in a bank, with zeros in the padding
        return [
            lambda: t / gain,
            lambda: jnp.log(jnp.exp(t) * gain),
            lambda: t * lax.rsqrt(gain + jnp.exp(t) - jnp.exp(t)),
            lambda: jnp.sqrt(gain * (t + 1.5)),
            lambda: (t + 1.5) ** gain,
            lambda: jnp.exp(t) / (jnp.exp(t) * gain),
        ][kind]()

    return Op(f"treacherous{kind}", (i,), (Aval((d,), scope.dtype),), apply)


def normed(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    d, axis, centred = scope.values[i].shape[1], kin.integer(0, 1), kin.flag()

    def apply(w: Any, x: Any) -> Any:
        y = x - jnp.mean(x, axis, keepdims=True) if centred else x
        return y * lax.rsqrt(jnp.mean(y * y, axis, keepdims=True) + 0.1) * w[0][None] + w[1][None]

    return Op(f"normed{axis}", (i,), (Aval((d,), scope.dtype),) * 2, apply)


def reduced(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    axis, kind, combined = kin.integer(0, 1), kin.integer(0, 5), kin.flag()

    def apply(w: Any, x: Any) -> Any:
        y = [
            lambda: jnp.sum(x, axis, keepdims=True) / 4,
            lambda: jnp.max(x, axis, keepdims=True),
            lambda: jnp.min(x, axis, keepdims=True),
            lambda: jnp.prod(1 + jnp.tanh(x) / 4, axis, keepdims=True),
            lambda: jax.nn.softmax(x, axis),
            lambda: jax.nn.logsumexp(x, axis, keepdims=True),
        ][kind]()
        return jnp.broadcast_to(y, x.shape) - x if combined else y

    return Op(f"reduced{kind}", (i,), (), apply)


def residual(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    d, e = scope.values[i].shape[1], near(kin, own, 5)
    weights = Aval((d, e), scope.dtype), Aval((e, d), scope.dtype)
    return Op("residual", (i,), weights, lambda w, x: x + product(jnp.tanh(product(x, w[0])), w[1]))


def forked(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    """Two independent branches, in either order."""
    d, e, swapped = scope.values[i].shape[1], near(kin, own, 5), own.flag()

    def apply(w: Any, x: Any) -> Any:
        branches = [lambda: jnp.tanh(product(x, w[0])), lambda: jnp.sin(product(x, w[1]))]
        first, second = (branch() for branch in (branches[::-1] if swapped else branches))
        return first * second

    return Op("forked", (i,), (Aval((d, e), scope.dtype),) * 2, apply)


def attended(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    n, d = scope.values[i].shape
    heads, e = near(kin, own, 2), near(kin, own, 3)
    causal, scale = kin.flag(), literal(kin, own)

    def apply(w: Any, x: Any) -> Any:
        q, k, v = (product(x, m).reshape(n, heads, e).transpose(1, 0, 2) for m in w[:3])
        scores = jnp.einsum("hte,hse->hts", q, k, precision=HIGHEST) * scale
        if causal:
            scores = jnp.where(jnp.tril(jnp.ones((n, n), jnp.bool_))[None], scores, -jnp.inf)
        mixed = jnp.einsum("hts,hse->the", jax.nn.softmax(scores), v, precision=HIGHEST)
        return x + product(mixed.reshape(n, heads * e), w[3])

    weights = *[Aval((d, heads * e), scope.dtype)] * 3, Aval((heads * e, d), scope.dtype)
    return Op("attended", (i,), weights, apply)


def selected(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    """By a mask that is an input."""
    x, c = scope.values[i], literal(kin, own)
    (mask,) = scope.candidates("b")
    return Op("selected", (i, mask), (), lambda w, v, m: jnp.where(fit(m, Aval(x.shape, m.dtype)), v, c))


def counted(kin: Draw, own: Draw, scope: Scope, i: int) -> Op | None:
    """A product of integers, and what is reduced of it; added as a float by whatever layer comes next."""
    k = scope.candidates("i")[-1]  # the input
    columns, e = scope.values[k].shape[1], near(kin, own, 4)
    kind, axis = kin.integer(0, 8), kin.integer(0, 1)

    def whole(w: Any, v: Any) -> Any:
        y = lax.dot(v - 3, w[0])
        return [
            lambda: lax.reduce_sum(y, (axis,)),
            lambda: lax.reduce_max(y, (axis,)),
            lambda: lax.reduce_min(y, (axis,)),
            lambda: lax.reduce_prod(y | 1, (axis,)),
            lambda: lax.reduce_and(y, (axis,)),
            lambda: lax.reduce_or(y, (axis,)),
            lambda: lax.reduce_and(y > 0, (axis,)).astype(jnp.int32),
            lambda: lax.reduce_or(y > 9, (axis,)).astype(jnp.int32),
            lambda: lax.rem(y, jnp.abs(w[0][:1]) + 1),
        ][kind]()

    op = Op(f"counted{kind}", (k,), (Aval((columns, e), jnp.dtype(jnp.int32)),), whole, exact=True)
    if not scope.add(op):
        return None
    j = len(scope.values) - 1
    return Op("with counts", (i, j), (), lambda w, x, y: x + fit(jnp.sin(y.astype(x.dtype)), x))


def moved(kin: Draw, own: Draw, scope: Scope, i: int) -> Op | None:
    (n, d), kind = scope.values[i].shape, kin.integer(0, 9)
    if kind in (5, 6) and d < 2:
        return None

    def apply(w: Any, x: Any) -> Any:
        return [
            lambda: x.T,
            lambda: x.reshape(1, n * d),
            lambda: x.reshape(n * d, 1),
            lambda: lax.rev(x, (1,)),
            lambda: jnp.concatenate([x, jnp.sin(x)], 1),
            lambda: x[:, 1:],
            lambda: x[:, ::2],
            lambda: x[:, None].transpose(2, 1, 0).reshape(d, n),
            lambda: jnp.stack([x, -x], 1).reshape(2 * n, d),
            lambda: x[:1] * 2,
        ][kind]()

    return Op(f"moved{kind}", (i,), (), apply, exact=True)


def as_image(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    n, d = scope.values[i].shape
    shape = kin.choice([(1, n, d, 1), (1, n, 1, d)])
    return Op("as image", (i,), (), lambda w, x: x.reshape(shape), exact=True)


ROWS = (
    dense, dense, dense, activated, treacherous, normed, reduced, residual, forked, attended, selected, counted, moved,
    as_image,
)  # fmt: skip
