"""A heavy op as a plain matrix product, for packs of ops that have nothing else in common.

    left [G,R,*lhs] -> [G*B, R*M, K]     a convolution through its patches
    right [G,*rhs]  -> [G*B, K, N]
    result [G*B, R*M, N] -> [G,R,*out], and back by rows

B batch dimensions of a dot, as one; R lanes that share a right operand, as rows.
"""

from __future__ import annotations

from math import prod
from typing import Any

import jax.numpy as jnp

from coalesce.heavy import HeavyOp
from coalesce.kernels.conv_slices import im2col
from coalesce.layout import AS_IS, Layout


def layout(op: HeavyOp) -> Layout:
    """How a weight, which has no batch dimensions, lies as [K, N]."""
    return AS_IS if op.rhs.shape == (op.k, op.n) else AS_IS.reshape((op.k, op.n))


def left(op: HeavyOp, x: Any) -> Any:
    g, r = x.shape[:2]
    if op.kind == "conv":
        patches = im2col(op, x.reshape(prod(x.shape[:3]), *op.lhs.shape[1:]))
        return patches.reshape(g, r * op.m, op.k)
    return jnp.moveaxis(x.reshape(g, r, op.batch, op.m, op.k), 1, 2).reshape(g * op.batch, r * op.m, op.k)


def right(op: HeavyOp, w: Any) -> Any:
    return w.reshape(w.shape[0] * op.batch, op.k, op.n)


def rows(op: HeavyOp, y: Any) -> Any:
    """[G,R,*out] -> [G*B, R*M, N], as `result` takes it back."""
    g, r = y.shape[:2]
    return jnp.moveaxis(y.reshape(g, r, op.batch, op.m, -1), 1, 2).reshape(g * op.batch, r * op.m, -1)


def result(op: HeavyOp, y: Any, groups: int, rows: int) -> Any:
    """Of some of the columns too, where they are one dimension."""
    columns = y.shape[-1]
    shape = op.out.shape if columns == op.n else (*op.out.shape[:-1], columns)
    return jnp.moveaxis(y.reshape(groups, op.batch, rows, op.m, columns), 2, 1).reshape(groups, rows, *shape)
