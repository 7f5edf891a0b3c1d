"""Scans, branches and loops whose bodies are blocks of drawn ops, and `extend`, which draws ops of all kinds. See
tests/programs.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from tests.program_heavy import HEAVY
from tests.program_ops import LIGHT
from tests.programs import Aval, Block, Draw, fit, kind_of, Op, Scope

DEPTH = 2  # how deep control flow nests


def body(draw: Draw, scope: Scope, args: Sequence[Aval], exact: Sequence[bool]) -> Block:
    inner = Scope(args, exact, scope.dtype, scope.depth + 1)
    extend(draw, inner, draw.integer(1, 2))
    return inner.block()


def positives(x: Any) -> Any:
    """A small integer that tells lanes apart."""
    return jnp.sum(x if x.dtype == jnp.bool_ else x > 0, dtype=jnp.int32)


def scanned(draw: Draw, scope: Scope, i: int) -> Op:
    """Over the leading dimension of the value, with a carry, a constant of the outside and weights in the body."""
    x = scope.values[i]
    xs = Aval(x.shape or (1,), x.dtype)
    carry = Aval(draw.shape(2, 3), x.dtype)
    j = draw.choice(scope.candidates("f"))
    exact = [False, scope.exact[i], scope.exact[j]]
    block = body(draw, scope, [carry, Aval(xs.shape[1:], xs.dtype), scope.values[j]], exact)
    reverse, unroll = draw.flag(), draw.choice([1, 2, True])
    from_value, result = draw.flag(), draw.choice(["carry", "ys", "both"])

    def apply(w: Any, v: Any, const: Any) -> Any:
        def step(c: Any, item: Any) -> Any:
            new = (c + jnp.tanh(block.result(w, [c, item, const], c))) / 2
            return new, (item, c)

        start = fit(v, carry) if from_value else jnp.zeros(carry.shape, v.dtype)
        end, ys = lax.scan(step, start.astype(v.dtype), v.reshape(xs.shape), reverse=reverse, unroll=unroll)
        parts = {"carry": [end], "ys": ys, "both": [end, *ys]}[result]
        return jnp.concatenate([part.reshape(-1) for part in parts])

    return Op(f"scan({block})", (i, j), block.weights, apply)


def branched(draw: Draw, scope: Scope, i: int) -> Op | None:
    """By an exact value of any kind, which differs between lanes unless it is a constant."""
    by = scope.candidates("fib", exact=True)
    if not by:
        return None
    x = scope.values[i]
    blocks = [body(draw, scope, [x], [scope.exact[i]]) for _ in range(draw.integer(2, 3))]
    like = draw.choice([(), (2,), x.shape])

    def apply(w: Any, v: Any, by: Any) -> Any:
        rest = iter(w)
        branches = [partial(b.result, [next(rest) for _ in b.weights], like=Aval(like, v.dtype)) for b in blocks]
        return lax.switch(positives(by) % len(blocks), branches, [v])

    weights = tuple(w for b in blocks for w in b.weights)
    return Op(f"cond({' | '.join(map(str, blocks))})", (i, draw.choice(by)), weights, apply)


def looped(draw: Draw, scope: Scope, i: int) -> Op:
    """fori_loop with a fixed trip count, or with one that differs between lanes."""
    x = scope.values[i]
    block = body(draw, scope, [x], [False])
    counts = scope.candidates("fib", exact=True)
    j = draw.choice([*counts, *counts, None]) if counts else None

    def apply(w: Any, v: Any, *count: Any) -> Any:
        trips = positives(count[0]) % 4 if count else 2
        return lax.fori_loop(0, trips, lambda _, c: (c + jnp.tanh(block.result(w, [c], c))) / 2, v)

    return Op(f"loop({block})", (i,) if j is None else (i, j), block.weights, apply)


def layered(draw: Draw, scope: Scope, i: int) -> Op:
    """Equal layers by a scan over their weights, stacked in one array; another weight is the first carry."""
    x = scope.values[i]
    d = draw.integer(1, 4)
    weights = Aval((draw.integer(1, 3), d, d), x.dtype), Aval((d,), x.dtype)

    def apply(w: Any, v: Any) -> Any:
        def layer(h: Any, m: Any) -> Any:
            return jnp.tanh(jnp.dot(h, m, precision="highest")) + fit(v, h), None

        return lax.scan(layer, w[1], w[0])[0]

    return Op("layers", (i,), weights, apply)


CONTROL = {"f": (scanned, branched, looped, looped, layered), "i": (), "b": ()}


def extend(draw: Draw, scope: Scope, n: int) -> None:
    """Draw up to n ops into the scope, most of them on the latest value."""
    for _ in range(n):
        found = scope.candidates("fib")
        i = draw.choice(found[:1] * len(found) + found)
        kind = kind_of(scope.values[i])
        tables = [LIGHT, HEAVY, CONTROL] if scope.depth < DEPTH else [LIGHT, HEAVY]
        rules = draw.choice([t[kind] for t in tables if t[kind]])
        op = draw.choice(rules)(draw, scope, i)
        if op is not None:
            scope.add(op)
