"""Recurrent layers on rows, and branches. See tests/kin.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.kin_rows import near, product
from tests.programs import Aval, Draw, fit, Op, Scope


def recurrent(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    """Over the rows, with one vector for a carry. Lengths are as many as there are rows."""
    n, d = scope.values[i].shape
    h = near(kin, own, 4)
    reverse, hoisted, learned = kin.flag(), kin.flag(), kin.flag()
    result = kin.choice(["ys", "carry", "both"])
    inside = kin.choice(["", "", "", "while", "cond"])

    def apply(w: Any, x: Any) -> Any:
        xs = product(x, w[0]) if hoisted else x

        def step(carry: Any, item: Any) -> Any:
            c, count = carry
            item = item if hoisted else product(item[None], w[0])[0]
            new = jnp.tanh(product(c[None], w[1])[0] + item)
            if inside == "while":
                _, new = lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] / 2), (0, new))
            if inside == "cond":
                new = lax.cond(count[0] % 2 == 0, lambda v: v, lambda v: jnp.sin(product(v[None], w[1])[0]), new)
            return (new, count + 1), (new, c)

        start = w[2] if learned else jnp.zeros(h, x.dtype)
        (end, count), (ys, before) = lax.scan(step, (start, jnp.zeros(2, jnp.int32)), xs, reverse=reverse)
        found = {"ys": ys * before, "carry": end[None], "both": ys + end[None]}[result]
        return found + fit(jnp.sin(count.astype(x.dtype)), found)

    weights = Aval((d, h), scope.dtype), Aval((h, h), scope.dtype), *[Aval((h,), scope.dtype)] * learned
    return Op(f"recurrent {inside}", (i,), weights, apply)


def gated(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    """An LSTM over a fixed number of steps: the rows are a batch, and the two carries are of one shape."""
    n, d = scope.values[i].shape
    h, length = near(kin, own, 3), near(kin, own, 4)
    reverse, both = kin.flag(), kin.flag()

    def apply(w: Any, x: Any) -> Any:
        xs = jnp.stack([x * (k + 1) / length for k in range(length)])

        def step(carry: Any, item: Any) -> Any:
            out, state = carry
            gates = product(out, w[1]) + product(item, w[0]) + w[2][None]
            keep, write, show, new = (gates[:, k * h : (k + 1) * h] for k in range(4))
            state = state * jax.nn.sigmoid(keep) + jax.nn.sigmoid(write) * jnp.tanh(new)
            out = jax.nn.sigmoid(show) * jnp.tanh(state)
            return (out, state), jnp.mean(out, 1)

        zeros = jnp.zeros((n, h), x.dtype)
        (out, state), ys = lax.scan(step, (zeros, zeros + 0.5), xs, reverse=reverse)
        return out + state * jnp.mean(ys) if both else ys.T

    weights = Aval((d, 4 * h), scope.dtype), Aval((h, 4 * h), scope.dtype), Aval((4 * h,), scope.dtype)
    return Op("gated", (i,), weights, apply)


def layered(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    """Equal layers by a scan over their weights."""
    d, depth = scope.values[i].shape[1], near(kin, own, 3)

    def apply(w: Any, x: Any) -> Any:
        return lax.scan(lambda h, m: (x + jnp.tanh(product(h, m)), None), x, w[0])[0]

    return Op("layered", (i,), (Aval((depth, d, d), scope.dtype),), apply)


def nested(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    """A scan inside a scan."""
    d, outer, inner = scope.values[i].shape[1], near(kin, own, 3), near(kin, own, 2)

    def apply(w: Any, x: Any) -> Any:
        def step(c: Any, _: Any) -> Any:
            c, _ = lax.scan(lambda h, _: (jnp.tanh(product(h, w[0])), None), c, None, inner)
            return jnp.sin(product(c, w[1])) + x, None

        return lax.scan(step, x, None, outer)[0]

    return Op("nested", (i,), (Aval((d, d), scope.dtype),) * 2, apply)


def branched(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    """By an integer of the tenant's own."""
    d, e = scope.values[i].shape[1], near(kin, own, 4)
    k = scope.candidates("i")[-1]

    def apply(w: Any, x: Any, which: Any) -> Any:
        branches = [lambda: jnp.tanh(product(x, w[0])), lambda: product(jnp.sin(x), w[1])]
        return lax.switch(which.reshape(-1)[0] % 2, branches)

    return Op("branched", (i, k), (Aval((d, e), scope.dtype),) * 2, apply)


SCANS = (recurrent, recurrent, recurrent, gated, gated, layered, nested, branched)
