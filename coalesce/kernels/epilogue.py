"""What a kernel does to its result, tile by tile, before it writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import factorial, pi, sqrt
from typing import Any

import jax.numpy as jnp
from jax import lax

from coalesce import jaxpr as J
from coalesce.kernels.halves import FUNCTIONS

WHOLE, COLUMN = "whole", "column"

# What a kernel can do to a tile: elementwise, and known to Pallas' Triton backend or written below.
TILEWISE = frozenset(
    """abs acos acosh add and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type cos cosh div eq erf
    erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow round
    rsqrt select_n sign sin sinh sqrt square sub tan tanh""".split()
)
# Of these, what a GPU has no units for in 16 bits: it is computed in 32 and rounded.
WIDENED = frozenset(
    """acos acosh asin asinh atan atan2 atanh cbrt cos cosh div erf erfc exp exp2 expm1 integer_pow log log1p logistic
    pow round rsqrt sin sinh sqrt tan tanh""".split()
)

# erfc(z) = t exp(-z^2 + series of t) with t = 1 / (1 + z/2), right to 1.2e-7 of itself (Numerical Recipes, 6.2); of
# powers of t, the highest first.
CHEBYSHEV = (
    0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368,
    -1.26551223,
)  # fmt: skip
TERMS = 8  # of erf's series at zero, in float32 exact below
NEAR_ZERO = 0.5


@dataclass(frozen=True)
class End:
    """A result of an epilogue."""

    dtype: Any
    strips: int = 1


@dataclass(frozen=True)
class Epilogue:
    """`apply(tile, *operand tiles)`, all [m, n] and each in its operand's dtype, the tile in the op's own.

    An operand is WHOLE, [G,R,*op.out.shape], or one COLUMN vector for all rows of a lane, [G,R,N]; a cut of a slab is
    one for all rows of a problem, [G,N].

    Of some kernels it may take the result's columns in `parts` strips of equal width, and leave several results. A tile
    is then one of a strip, there are `strips[i]` of operand i, whose last dimension is as many strips wide, and `apply`
    gives all of the first of `ends`, then those of the second, and so on.
    """

    apply: Callable[..., Any]
    kinds: tuple[str, ...]  # of the operands
    dtype: Any  # of the result, or the first of several
    parts: int = 1
    strips: tuple[int, ...] = ()
    ends: tuple[End, ...] = ()  # none: one result, as wide as the op's

    @property
    def plain(self) -> bool:
        """Whether it takes the columns as they are, and leaves one result of that width."""
        return self.parts == 1 and not self.ends

    @property
    def left(self) -> tuple[End, ...]:
        return self.ends or (End(self.dtype, self.parts),)

    def strips_of(self, operand: int) -> int:
        return self.strips[operand] if self.strips else 1

    def results(self, tiles: Sequence[Any], given: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """The strips of each result, from those of the product and of each operand."""
        found = self.apply(*tiles, *(tile for strips in given for tile in strips))
        if self.plain:
            return [[found]]
        rest = iter(found)
        return [[next(rest) for _ in range(end.strips)] for end in self.left]


NONE = Epilogue(lambda y: y, (), None)


def runs_on_tiles(eqn: J.Eqn) -> bool:
    return eqn.primitive.name in TILEWISE


def on_tile(eqn: J.Eqn, args: list[Any]) -> Any:
    """The result of an equation that runs on tiles."""
    name, dtype = eqn.primitive.name, J.dtype(eqn.outvars[0])
    if name in WIDENED and dtype in ("bfloat16", "float16"):
        wide = [jnp.asarray(x, jnp.float32) for x in args]
        return (FUNCTIONS[name](*wide) if name in FUNCTIONS else in_float(eqn, wide)).astype(dtype)
    return in_float(eqn, args)


def in_float(eqn: J.Eqn, args: list[Any]) -> Any:
    """An equation on floats that a GPU computes with, by operations that the backend has."""
    match eqn.primitive.name:
        case "integer_pow" if eqn.params["y"] > 1:  # which not every backend has
            return power(args[0], eqn.params["y"])
        case "max" if jnp.issubdtype(J.dtype(eqn.outvars[0]), jnp.floating):
            return larger(*args)
        case "min" if jnp.issubdtype(J.dtype(eqn.outvars[0]), jnp.floating):
            return smaller(*args)
        case "clamp":
            least, x, most = args
            return smaller(larger(x, least), most)
        case "erf":
            return error_function(args[0])
        case "erfc":
            return complementary_error(args[0])
        case "round":
            return rounded(args[0], to_even=eqn.params["rounding_method"] == lax.RoundingMethod.TO_NEAREST_EVEN)
    return J.bind(eqn, args)[0]


# Triton's own give the number where one of them is a NaN, XLA's and everybody else's the NaN.


def larger(a: Any, b: Any) -> Any:
    return jnp.where((a > b) | (a != a), a, b)


def smaller(a: Any, b: Any) -> Any:
    return jnp.where((a < b) | (a != a), a, b)


def complementary_error(x: Any) -> Any:
    """erfc(x) of float32."""
    z = jnp.abs(x)
    t = 1.0 / (1.0 + 0.5 * z)
    series = jnp.zeros_like(x)
    for factor in CHEBYSHEV:
        series = series * t + factor
    positive = t * jnp.exp(series - z * z)
    return jnp.where(x < 0, 2.0 - positive, positive)


def error_function(x: Any) -> Any:
    """erf(x) of float32; near zero, where a difference from 1 would say little, by its series."""
    square, series = x * x, jnp.zeros_like(x)
    for n in reversed(range(TERMS)):
        series = series * square + (-1) ** n * 2 / sqrt(pi) / (factorial(n) * (2 * n + 1))
    return jnp.where(jnp.abs(x) < NEAR_ZERO, x * series, 1.0 - complementary_error(x))


def rounded(x: Any, to_even: bool) -> Any:
    """To the nearest integer; of two that are as near to the even one, or else to the one that is farther from zero."""
    size = jnp.abs(x)
    below = jnp.floor(size)
    over = size - below
    odd = below - 2.0 * jnp.floor(0.5 * below) == 1.0
    between = (over == 0.5) & odd if to_even else over == 0.5
    nearest = jnp.where((over > 0.5) | between, below + 1.0, below)
    return jnp.where(over == 0.0, x, jnp.where(x < 0, -nearest, nearest))  # -0.0 keeps its sign


def power(x: Any, n: int) -> Any:
    """By products: of the square, and once more by x if n is odd."""
    if n == 1:
        return x
    square = power(x * x, n // 2)
    return square * x if n % 2 else square
