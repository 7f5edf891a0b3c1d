"""Light ops that compute: elementwise, reductions, normalisation, integers, random bits. See tests/programs.py.

Each rule `(draw, scope, i) -> Op` gives one op that reads value `i`, of the kind it is listed under in LIGHT.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.program_moves import MOVES
from tests.programs import Aval, Draw, fit, Op, Scope

TABLE = jnp.arange(16.0) / 16  # closed over: no parameter of anything


@jax.custom_vjp
def squash(v: Any) -> Any:
    return v / (1 + jnp.abs(v))


squash.defvjp(lambda v: (squash(v), None), lambda _, g: (g,))

# Continuous, and of moderate slope: what is rounded differently stays near.
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
    "softmax": lambda v: jax.nn.softmax(v.reshape(-1)),
    "sort": lambda v: jnp.sort(v.reshape(-1)),
    "cumsum": lambda v: jnp.cumsum(v.reshape(-1)),
    "checkpoint": jax.checkpoint(lambda v: jnp.cos(v) * v),
    "jit": jax.jit(lambda v: jnp.tanh(v) + v),
    "custom_vjp": squash,
    "closed_over": lambda v: v + fit(TABLE, v),
    "weak": lambda v: jnp.full(v.shape, 0.5),  # of a weak type, whatever the operand
}


def unary(draw: Draw, scope: Scope, i: int) -> Op:
    name = draw.choice(sorted(UNARY))
    return Op(name, (i,), (), lambda _, v: UNARY[name](v))


BINARY = {"add": jnp.add, "mul": lambda a, b: jnp.tanh(a) * b, "max": jnp.maximum, "mean": lambda a, b: (a + b) / 2}


def binary(draw: Draw, scope: Scope, i: int) -> Op:
    """Of two values; the second one takes the shape of the first."""
    name, x = draw.choice(sorted(BINARY)), scope.values[i]
    j = draw.choice([j for j in scope.candidates("f") if scope.values[j].dtype == x.dtype])
    return Op(name, (i, j), (), lambda _, a, b: BINARY[name](a, fit(b, a)))


def biased(draw: Draw, scope: Scope, i: int) -> Op:
    """Of a value and a weight, which broadcasts."""
    name, x = draw.choice(sorted(BINARY)), scope.values[i]
    weight = Aval(tuple(s if draw.flag() else 1 for s in x.shape), x.dtype)
    return Op(f"{name}_weight", (i,), (weight,), lambda w, a: BINARY[name](a, jnp.broadcast_to(w[0], a.shape)))


def batch_norm(draw: Draw, scope: Scope, i: int) -> Op:
    """With running statistics: all of it but one product and one sum depends on weights alone."""
    x = scope.values[i]

    def apply(w: Any, v: Any) -> Any:
        mean, var, scale, bias = (jnp.broadcast_to(a, v.shape) for a in w)
        return (v - mean) * lax.rsqrt(jnp.square(var) + 1.0) * scale + bias

    return Op("batch_norm", (i,), (Aval(x.shape[-1:], x.dtype),) * 4, apply)


def root_sum_square(v: Any, axis: Any) -> Any:
    return jnp.sqrt(jnp.sum(v * v, axis=axis) + 1.0)


REDUCE = {"sum": jnp.sum, "max": jnp.max, "mean": jnp.mean, "logsumexp": jax.nn.logsumexp, "rss": root_sum_square}


def reduced(draw: Draw, scope: Scope, i: int) -> Op:
    name = draw.choice(sorted(REDUCE))
    axes = tuple(d for d in range(len(scope.values[i].shape)) if draw.flag())
    return Op(name, (i,), (), lambda _, v: REDUCE[name](v, axis=axes))


POOL = {"max": (-jnp.inf, lax.max), "sum": (0.0, lax.add)}


def pooled(draw: Draw, scope: Scope, i: int) -> Op:
    """Over windows of any shape."""
    name, shape = draw.choice(sorted(POOL)), scope.values[i].shape
    window, strides = (tuple(draw.integer(1, 2) for _ in shape) for _ in range(2))
    first, combine = POOL[name]

    def apply(_: Any, v: Any) -> Any:
        return lax.reduce_window(v, jnp.asarray(first, v.dtype), combine, window, strides, "SAME")

    return Op(f"pool_{name}", (i,), (), apply)


def widened(draw: Draw, scope: Scope, i: int) -> Op:
    """Part of the way in float32, as normalisation layers go; the weight brings the dtype back."""
    weight = Aval((), scope.dtype)
    return Op("widen", (i,), (weight,), lambda w, v: jnp.sin(v.astype(jnp.float32)).astype(w[0].dtype))


POSITIONS = {
    "argmax": lambda v: jnp.argmax(v.reshape(-1)),
    "compare": lambda v: v > 0,
    "floor": lambda v: jnp.floor(v).astype(jnp.int32),
}


def positions(draw: Draw, scope: Scope, i: int) -> Op | None:
    """Integers and bools from floats, which must be exact."""
    name = draw.choice(sorted(POSITIONS))
    return Op(name, (i,), (), lambda _, v: POSITIONS[name](v), exact=True) if scope.exact[i] else None


def random_integers(v: Any) -> Any:
    return jax.random.randint(jax.random.key(v.reshape(-1)[0]), (3,), 0, 8)


INTEGER = {
    "affine": lambda v: 3 * v + 1,
    "mod": lambda v: v % 5,
    "bits": lambda v: (v ^ 5) & 7,
    "neg": lambda v: -v,
    "cumsum": lambda v: jnp.cumsum(v.reshape(-1)),
    "sum": jnp.sum,
    "max": jnp.max,
    "compare": lambda v: v > 3,
    "sort": lambda v: jnp.sort(v.reshape(-1)),
    "weak": lambda v: jnp.full(v.shape, 3),
    "random": random_integers,
    "one_hot": lambda v: jax.nn.one_hot(v.reshape(-1), 5, dtype=jnp.int32),
}


def integer(draw: Draw, scope: Scope, i: int) -> Op:
    name = draw.choice(sorted(INTEGER))
    return Op(f"int_{name}", (i,), (), lambda _, v: INTEGER[name](v), exact=True)


BOOL = {"not": jnp.logical_not, "any": jnp.any, "all": jnp.all, "int": lambda v: v.astype(jnp.int32)}


def boolean(draw: Draw, scope: Scope, i: int) -> Op:
    name = draw.choice(sorted(BOOL))
    return Op(f"bool_{name}", (i,), (), lambda _, v: BOOL[name](v), exact=True)


def to_float(draw: Draw, scope: Scope, i: int) -> Op:
    """Of an integer or a bool; the weight brings the dtype."""
    weight = Aval((), scope.dtype)
    return Op("to_float", (i,), (weight,), lambda w, v: jnp.tanh(v.astype(w[0].dtype)) + w[0])


LIGHT = {
    "f": (unary, binary, biased, batch_norm, reduced, pooled, widened, positions, *MOVES["f"]),
    "i": (integer, to_float, *MOVES["i"]),
    "b": (boolean, to_float, *MOVES["b"]),
}
