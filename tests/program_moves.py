"""Ops that move values and compute nothing: shapes, slices, gathers, scatters, selection. See tests/programs.py.

Each rule `(draw, scope, i) -> Op` gives one op that reads value `i`; all of them are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from tests.programs import Aval, Draw, fit, Op, Scope

SHAPES = ("reshape", "transpose", "broadcast", "flip", "slice", "pad", "concat", "roll", "fit")


def moved(draw: Draw, scope: Scope, i: int) -> Op:
    """Any value in another shape or order."""
    name = draw.choice(SHAPES)
    move = movement(draw, name, scope.values[i].shape)
    return Op(name, (i,), (), lambda _, v: move(v), exact=True)


def movement(draw: Draw, name: str, shape: tuple[int, ...]) -> Callable[[Any], Any]:
    rank = len(shape)
    if name == "broadcast" and rank < 4:
        n, axis = draw.integer(1, 3), draw.integer(0, rank)
        larger = (*shape[:axis], n, *shape[axis:])
        return lambda v: lax.broadcast_in_dim(v, larger, [d for d in range(rank + 1) if d != axis])
    if name == "fit":
        other = draw.shape(4, 4)
        return lambda v: fit(v, Aval(other, v.dtype))
    if rank == 0:
        return lambda v: v[None]
    axis = draw.integer(0, rank - 1)
    match name:
        case "transpose":
            order = draw.shuffled(range(rank))
            return lambda v: jnp.transpose(v, order)
        case "flip":
            return lambda v: jnp.flip(v, axis)
        case "roll":
            return lambda v: jnp.roll(v, 1, axis)
        case "concat":
            return lambda v: jnp.concatenate([v, jnp.flip(v, axis)], axis)
        case "slice":
            start, step = draw.integer(0, shape[axis] - 1), draw.integer(1, 2)
            return lambda v: lax.slice_in_dim(v, start, None, step, axis)
        case "pad":
            low = [draw.integer(-1 if s > 2 else 0, 2) for s in shape]
            config = [(n, draw.integer(0, 1), draw.integer(0, 1)) for n in low]
            return lambda v: lax.pad(v, jnp.zeros((), v.dtype), config)
    other = draw.choice([(-1,), (*shape, 1), (1, *shape), (-1, shape[-1])])
    return lambda v: v.reshape(other)


def embedded(draw: Draw, scope: Scope, i: int) -> Op:
    """Rows of a table of weights."""
    n, mode = draw.integer(1, 5), draw.choice(["clip", "wrap", "fill"])
    table = Aval((n, draw.integer(1, 4)), scope.dtype)
    return Op("embed", (i,), (table,), lambda w, v: jnp.take(w[0], v % n, axis=0, mode=mode), exact=True)


def taken(draw: Draw, scope: Scope, i: int) -> Op:
    """Elements of another value, at the positions that an integer gives."""
    j, mode = draw.choice(scope.candidates("fib")), draw.choice(["clip", "wrap", "fill"])
    n = scope.values[j].size
    return Op("take", (i, j), (), lambda _, v, x: jnp.take(x.reshape(-1), jnp.abs(v) % n, mode=mode), exact=True)


def scattered(draw: Draw, scope: Scope, i: int) -> Op:
    j = draw.choice(scope.candidates("f"))
    n = scope.values[j].size
    return Op("scatter", (i, j), (), lambda _, v, x: x.reshape(-1).at[v.reshape(-1) % n].set(0.5), exact=True)


def sliced_at(draw: Draw, scope: Scope, i: int) -> Op:
    j = draw.choice(scope.candidates("fib"))
    n = max(1, scope.values[j].size // 2)

    def apply(_: Any, v: Any, x: Any) -> Any:
        return lax.dynamic_slice(x.reshape(-1), (v.reshape(-1)[0],), (n,))

    return Op("dynamic_slice", (i, j), (), apply, exact=True)


def selected(draw: Draw, scope: Scope, i: int) -> Op:
    """Of two values of floats, by a bool."""
    j, k = (draw.choice(scope.candidates("f")) for _ in range(2))
    return Op("where", (i, j, k), (), lambda _, m, a, b: jnp.where(jnp.resize(m, a.shape), a, fit(b, a)), exact=True)


MOVES = {"f": (moved,), "i": (moved, embedded, taken, scattered, sliced_at), "b": (moved, selected)}
