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


@dataclass(frozen=True)
class Epilogue:
    """`apply(tile, *operand tiles)`, all [m, n] and each in its operand's dtype, the tile in the op's own.

    An operand is WHOLE, [G,R,*op.out.shape], or one COLUMN vector for all rows of a lane, [G,R,N]; a cut of a slab is
    one for all rows of a problem, [G,N].
    """

    apply: Callable[..., Any]
    kinds: tuple[str, ...]  # of the operands
    dtype: Any  # of the result


def on_tile(eqn: J.Eqn, args: list[Any]) -> Any:
    """The result of a TILEWISE equation."""
    dtype = J.dtype(eqn.outvars[0])
    if eqn.primitive.name in ("max", "min") and jnp.issubdtype(dtype, jnp.floating):
        a, b = args  # Triton's own give the number where one of them is a NaN, XLA's and everybody else's the NaN
        first = a > b if eqn.primitive.name == "max" else a < b
        return jnp.where(first | (a != a), a, b)
    if eqn.primitive.name not in WIDENED or dtype not in ("bfloat16", "float16"):
        return J.bind(eqn, args)[0]
    return J.bind(eqn, [jnp.asarray(x, jnp.float32) for x in args])[0].astype(dtype)
