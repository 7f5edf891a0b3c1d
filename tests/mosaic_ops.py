"""Heavy ops such as mosaic_gemm runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from coalesce.heavy import heavy_op, HeavyOp


def dot(m: int, k: int, n: int, dtype: Any = jnp.bfloat16) -> HeavyOp:
    return op_of(lambda x, w: lax.dot(x, w, preferred_element_type=dtype), (m, k), (k, n), dtype)


def conv(h: int, w: int, channels: int, n: int, dtype: Any = jnp.bfloat16, **how: Any) -> HeavyOp:
    how = {"padding": "SAME", "window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | how
    taps = how.pop("taps", (3, 3))
    call = partial(lax.conv_general_dilated, **how)
    return op_of(call, (1, h, w, channels), (*taps, channels, n), dtype)


def op_of(call: Any, lhs: Any, rhs: Any, dtype: Any) -> HeavyOp:
    (eqn,) = jax.make_jaxpr(call)(jax.ShapeDtypeStruct(lhs, dtype), jax.ShapeDtypeStruct(rhs, dtype)).jaxpr.eqns
    return heavy_op(eqn)
