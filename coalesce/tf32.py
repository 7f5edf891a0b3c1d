"""TF32: what a GPU multiplies of a float32, the first 10 of the 23 bits of its mantissa.

XLA's kernels and Triton's round their operands to it. The tensor cores of a Hopper GPU, where they read shared memory
by themselves, cut off what they have no place for: every product is smaller by 7e-4 then, and so is every sum, layer
after layer (16 ResNet-50 were wrong by 1.8e-2 instead of 5e-4). What was rounded before loses nothing by that.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from coalesce.heavy import HeavyOp


def multiplies(op: HeavyOp) -> bool:
    """Whether an op of float32 may be computed from operands in TF32."""
    precisions = op.precision if isinstance(op.precision, tuple) else (op.precision,)
    return str(op.lhs.dtype) == "float32" and {*precisions} <= {None, lax.Precision.DEFAULT}


def by_element(op: HeavyOp) -> bool:
    """Whether XLA multiplies and adds it element by element, in full: a product of one row or one column."""
    return min(op.m, op.n) == 1


def nearest(x: Any) -> Any:
    """The nearest number that TF32 has, of two the larger in size; infinities and NaNs stay. To round twice changes
    nothing, and what is larger stays so: the largest of some numbers can be rounded before or after it is found."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    cut = lax.bitcast_convert_type((bits + 0x1000) & ~0x1FFF, jnp.float32)
    return lax.select(x == x, cut, x)


def near(x: Any) -> Any:
    """The nearest number that TF32 has, of two the even one, by an operation of XLA's that reads x once: then XLA fuses
    what makes x with it, where `nearest` left five kernels of a ViT's norm instead of two. Kernels have no such one."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)
