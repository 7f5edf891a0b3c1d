"""Light ops: movement, elementwise arithmetic, reductions, integers and random bits. See tests/programs.py.

Each rule `(draw, scope, i) -> Op` gives one op that reads value `i`, of the kind it is listed under.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax

from tests.programs import Aval, fit, Op, Scope


def moved(draw: Any, scope: Scope, i: int) -> Op:
    """Movement of any value: exact, whatever the dtype."""
    x = scope.values[i]
    rank = len(x.shape)

    def op(name: str, fn: Any) -> Op:
        return Op(name, (i,), (), lambda _, v: fn(v), exact=True)

    choice = draw(st.sampled_from(["reshape", "transpose", "broadcast", "flip", "slice", "pad", "concat", "roll", "tile"]))
    if choice == "transpose" and rank > 1:
        order = draw(st.permutations(range(rank)))
        return op("transpose", lambda v: jnp.transpose(v, order))
    if choice == "broadcast" and rank < 4:
        n, axis = draw(st.integers(1, 3)), draw(st.integers(0, rank))
        shape = (*x.shape[:axis], n, *x.shape[axis:])
        dims = [d for d in range(rank + 1) if d != axis]
        return op("broadcast", lambda v: lax.broadcast_in_dim(v, shape, dims))
    if rank == 0:
        return op("expand", lambda v: v[None])
    axis = draw(st.integers(0, rank - 1))
    match choice:
        case "flip":
            return op("flip", lambda v: jnp.flip(v, axis))
        case "slice":
            start, step = draw(st.integers(0, x.shape[axis] - 1)), draw(st.integers(1, 2))
            return op("slice", lambda v: lax.slice_in_dim(v, start, None, step, axis))
        case "pad":
            config = [(draw(st.integers(-1 if s > 2 else 0, 2)), draw(st.integers(0, 1)), draw(st.integers(0, 1)))
                      for s in x.shape]  # fmt: skip
            return op("pad", lambda v: lax.pad(v, jnp.zeros((), v.dtype), config))
        case "concat":
            return op("concat", lambda v: jnp.concatenate([v, jnp.flip(v, axis)], axis))
        case "roll":
            return op("roll", lambda v: jnp.roll(v, 1, axis))
        case "tile":
            shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
            return op("fit", lambda v: fit(v, Aval(shape, v.dtype)))
    shape = draw(st.sampled_from([(x.size,), (*x.shape, 1), (1, *x.shape), (-1, x.shape[-1])]))
    return op("reshape", lambda v: v.reshape(shape))


TABLE = jnp.arange(16.0) / 16  # closed over, not a parameter


@jax.custom_vjp
def squash(v: Any) -> Any:
    return v / (1 + jnp.abs(v))


squash.defvjp(lambda v: (squash(v), None), lambda _, g: (g,))

# Smooth or at least continuous, and of moderate slope: rounding stays rounding.
UNARY = {
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "abs": jnp.abs,
    "bell": lambda v: jnp.exp(-v * v),
    "scale": lambda v: v * 1.5,
    "shift": lambda v: 0.25 + v,
    "leaky": lambda v: jnp.where(v > 0, v, 0.5 * v),
    "clip": lambda v: jnp.clip(v, -1.0, 1.0),
    "softmax": lambda v: jax.nn.softmax(v) if v.ndim else v,
    "sort": lambda v: jnp.sort(v) if v.ndim else v,
    "cumsum": lambda v: jnp.cumsum(v, 0) if v.ndim else v,
    "checkpoint": jax.checkpoint(lambda v: jnp.cos(v) * v),
    "jit": jax.jit(lambda v: jnp.tanh(v) + v),
    "custom_vjp": squash,
    "closed_over": lambda v: v + fit(TABLE, v),
    "weak": lambda v: jnp.full(v.shape, 0.5),  # of a weak type, whatever the operand
}


def unary(draw: Any, scope: Scope, i: int) -> Op:
    name = draw(st.sampled_from(sorted(UNARY)))
    return Op(name, (i,), (), lambda _, v: UNARY[name](v))


BINARY = {"add": jnp.add, "mul": lambda a, b: jnp.tanh(a) * b, "max": jnp.maximum, "mean": lambda a, b: (a + b) / 2}


def binary(draw: Any, scope: Scope, i: int) -> Op:
    """Two values, or a value and a weight; the second one takes the shape of the first."""
    name = draw(st.sampled_from(sorted(BINARY)))
    x = scope.values[i]
    others = [j for j in scope.candidates("f") if scope.values[j].dtype == x.dtype]
    if draw(st.booleans()):
        j = draw(st.sampled_from(others))
        return Op(name, (i, j), (), lambda _, a, b: BINARY[name](a, fit(b, a)))
    shape = tuple(s if draw(st.booleans()) else 1 for s in x.shape)
    return Op(f"{name}_w", (i,), (Aval(shape, x.dtype),), lambda w, a: BINARY[name](a, jnp.broadcast_to(w[0], a.shape)))


def batch_norm(draw: Any, scope: Scope, i: int) -> Op:
    """With running statistics: all of it but one product and one sum depends on weights alone."""
    x = scope.values[i]
    stats = Aval(x.shape[-1:], x.dtype)

    def apply(w: Any, v: Any) -> Any:
        mean, var, scale, bias = (jnp.broadcast_to(a, v.shape) for a in w)
        return (v - mean) * lax.rsqrt(jnp.square(var) + 1.0) * scale + bias

    return Op("batch_norm", (i,), (stats,) * 4, apply)


REDUCE = {"sum": jnp.sum, "max": jnp.max, "mean": jnp.mean, "logsumexp": jax.nn.logsumexp, "norm": lambda v, axis: jnp.sqrt(
    jnp.sum(v * v, axis=axis) + 1.0)}  # fmt: skip


def reduced(draw: Any, scope: Scope, i: int) -> Op:
    name = draw(st.sampled_from(sorted(REDUCE)))
    axes = tuple(d for d in range(len(scope.values[i].shape)) if draw(st.booleans()))
    return Op(name, (i,), (), lambda _, v: REDUCE[name](v, axis=axes))


def widened(draw: Any, scope: Scope, i: int) -> Op:
    """Part of the way in float32, as normalisation layers do; the weight brings the dtype back."""
    return Op("widen", (i,), (Aval((), scope.dtype),), lambda w, v: jnp.sin(v.astype(jnp.float32)).astype(w[0].dtype))


def gathered(draw: Any, scope: Scope, i: int) -> Op:
    """An embedding table or another value, at positions that integers give."""
    n, d = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    mode = draw(st.sampled_from(["clip", "wrap", "fill"]))
    if draw(st.booleans()):
        table = Aval((n, d), scope.dtype)
        return Op("embed", (i,), (table,), lambda w, v: jnp.take(w[0], v % n, axis=0, mode=mode), exact=True)
    j = draw(st.sampled_from(scope.candidates("fib")))
    size = scope.values[j].size
    return Op("take", (i, j), (), lambda _, v, x: jnp.take(x.reshape(-1), jnp.abs(v) % size, mode=mode), exact=True)


def scattered(draw: Any, scope: Scope, i: int) -> Op:
    j = draw(st.sampled_from(scope.candidates("f")))
    n = scope.values[j].size
    return Op("scatter", (i, j), (), lambda _, v, x: x.reshape(-1).at[jnp.abs(v).reshape(-1) % n].set(0.5), exact=True)


def sliced_at(draw: Any, scope: Scope, i: int) -> Op:
    j = draw(st.sampled_from(scope.candidates("fib")))
    n = max(1, scope.values[j].size // 2)
    return Op("dynamic_slice", (i, j), (), lambda _, v, x: lax.dynamic_slice(x.reshape(-1), (v.reshape(-1)[0],), (n,)), True)


INTEGER = {
    "affine": lambda v: 3 * v + 1,
    "mod": lambda v: v % 5,
    "bits": lambda v: (v ^ 5) & 7,
    "neg": lambda v: -v,
    "cumsum": lambda v: jnp.cumsum(v.reshape(-1)),
    "sum": lambda v: jnp.sum(v),
    "max": lambda v: jnp.max(v),
    "compare": lambda v: v > 3,
    "sort": lambda v: jnp.sort(v.reshape(-1)),
    "weak": lambda v: jnp.full(v.shape, 3),
    "random": lambda v: jax.random.randint(jax.random.key(v.reshape(-1)[0]), (3,), 0, 8),
    "one_hot": lambda v: jax.nn.one_hot(v.reshape(-1), 5, dtype=jnp.int32),
}


def integer(draw: Any, scope: Scope, i: int) -> Op:
    name = draw(st.sampled_from(sorted(INTEGER)))
    return Op(f"int_{name}", (i,), (), lambda _, v: INTEGER[name](v), exact=True)


def to_float(draw: Any, scope: Scope, i: int) -> Op:
    """Of an integer or bool; the weight, which brings the dtype, makes the result the tenant's own."""
    weight = Aval((), scope.dtype)
    return Op("to_float", (i,), (weight,), lambda w, v: jnp.tanh(v.astype(w[0].dtype)) + w[0])


def positions(draw: Any, scope: Scope, i: int) -> Op | None:
    """Integers and bools from exact floats."""
    if not scope.exact[i]:
        return None
    how = draw(st.sampled_from([lambda v: jnp.argmax(v.reshape(-1)), lambda v: v > 0, lambda v: jnp.floor(v).astype(jnp.int32)]))
    return Op("positions", (i,), (), lambda _, v: how(v), exact=True)


BOOL = {"not": jnp.logical_not, "any": jnp.any, "all": lambda v: jnp.all(v, 0) if v.ndim else v, "int": lambda v: v.astype(
    jnp.int32)}  # fmt: skip


def boolean(draw: Any, scope: Scope, i: int) -> Op:
    name = draw(st.sampled_from(sorted(BOOL)))
    return Op(f"bool_{name}", (i,), (), lambda _, v: BOOL[name](v), exact=True)


def selected(draw: Any, scope: Scope, i: int) -> Op:
    j, k = (draw(st.sampled_from(scope.candidates("f"))) for _ in "ab")
    return Op("where", (i, j, k), (), lambda _, m, a, b: jnp.where(jnp.resize(m, a.shape), a, fit(b, a)), exact=True)


LIGHT = {
    "f": (moved, unary, binary, batch_norm, reduced, widened, positions),
    "i": (moved, gathered, scattered, sliced_at, integer, to_float),
    "b": (moved, selected, boolean, to_float),
}
