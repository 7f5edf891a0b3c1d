"""What a kernel does to its result, tile by tile, before it writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from coalesce import jaxpr as J

WHOLE, COLUMN = "whole", "column"

# What a kernel can do to a tile: elementwise, and known to Pallas' GPU backends.
TILEWISE = frozenset(
    """abs add and convert_element_type cos div eq exp ge gt integer_pow le log log1p logistic lt max min mul ne neg not
    or rsqrt select_n sign sin sqrt square sub tanh""".split()
)
# Of these, what a GPU has no units for in 16 bits: it is computed in 32 and rounded.
WIDENED = frozenset("cos div exp integer_pow log log1p logistic rsqrt sin sqrt tanh".split())


# Of 16 bits alone: by products, quotients and an exponential in 32, right to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
NARROW = frozenset({"erf", "erfc"})
SCALE = 0.3275911
SERIES = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)  # of powers, the highest first


@dataclass(frozen=True)
class Epilogue:
    """`apply(tile, *operand tiles)`, all [m, n] and each in its operand's dtype, the tile in the op's own.

    An operand is WHOLE, [G,R,*op.out.shape], or one COLUMN vector for all rows of a lane, [G,R,N]; a cut of a slab is
    one for all rows of a problem, [G,N].
    """

    apply: Callable[..., Any]
    kinds: tuple[str, ...]  # of the operands
    dtype: Any  # of the result


def runs_on_tiles(eqn: J.Eqn) -> bool:
    name = eqn.primitive.name
    return name in TILEWISE or (name in NARROW and J.dtype(eqn.outvars[0]) in ("bfloat16", "float16"))


def on_tile(eqn: J.Eqn, args: list[Any]) -> Any:
    """The result of an equation that runs on tiles."""
    dtype = J.dtype(eqn.outvars[0])
    if eqn.primitive.name == "integer_pow" and eqn.params["y"] > 1:  # which not every backend has
        return power(jnp.asarray(args[0], jnp.promote_types(dtype, jnp.float32)), eqn.params["y"]).astype(dtype)
    if eqn.primitive.name in ("max", "min") and jnp.issubdtype(dtype, jnp.floating):
        a, b = args  # Triton's own give the number where one of them is a NaN, XLA's and everybody else's the NaN
        first = a > b if eqn.primitive.name == "max" else a < b
        return jnp.where(first | (a != a), a, b)
    if eqn.primitive.name in NARROW:
        rest = complementary_error(jnp.asarray(args[0], jnp.float32))
        return (rest if eqn.primitive.name == "erfc" else 1.0 - rest).astype(dtype)
    if eqn.primitive.name not in WIDENED or dtype not in ("bfloat16", "float16"):
        return J.bind(eqn, args)[0]
    return J.bind(eqn, [jnp.asarray(x, jnp.float32) for x in args])[0].astype(dtype)


def complementary_error(x: Any) -> Any:
    """erfc(x) in float32."""
    t = 1.0 / (1.0 + SCALE * jnp.abs(x))
    series = jnp.zeros_like(x)
    for factor in SERIES:
        series = (series + factor) * t
    positive = series * jnp.exp(-(x * x))
    return jnp.where(x < 0, 2.0 - positive, positive)


def power(x: Any, n: int) -> Any:
    """By products: of the square, and once more by x if n is odd."""
    if n == 1:
        return x
    square = power(x * x, n // 2)
    return square * x if n % 2 else square
