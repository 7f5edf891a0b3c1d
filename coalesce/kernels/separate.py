"""The fallback: the operation itself, once for each right operand. Right for everything, and the best a CPU can do for
large convolutions."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from coalesce.heavy import HeavyOp
from coalesce.kernels import batched_dot
from coalesce.layout import AS_IS, Layout


def supports(op: HeavyOp) -> bool:
    return True


def layout(op: HeavyOp) -> Layout:
    return AS_IS


def run(op: HeavyOp, lhs: Any, rhs: Any) -> Any:
    """lhs [G,R,*lhs] x rhs [G,*rhs] -> [G,R,*out]."""
    return jnp.stack([one(op, lhs[g], rhs[g]) for g in range(lhs.shape[0])])


def one(op: HeavyOp, lhs: Any, rhs: Any) -> Any:
    """lhs [R,*lhs] x rhs [*rhs] -> [R,*out]."""
    if op.kind == "dot":
        return batched_dot.run(op, lhs[None], rhs[None])[0]
    if op.params["batch_group_count"] > 1:  # the batch dimension is taken
        return jnp.stack([lax.conv_general_dilated(x, rhs, **op.params) for x in lhs])
    r, n = lhs.shape[:2]
    out = lax.conv_general_dilated(lhs.reshape(r * n, *lhs.shape[2:]), rhs, **op.params)
    return out.reshape(r, n, *out.shape[1:])
