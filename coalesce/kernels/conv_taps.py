"""Depthwise convolutions as a sum over the window's taps: what each tap reads of the operand times the tap's weights.

That is elementwise work, which XLA makes one loop together with what follows, a normalisation and an activation. It
reads and writes what its neighbours do, lanes first and channels last, where a library's convolution wants the lanes'
channels side by side.

Nothing is padded. A tap that would read padding reads the nearest element of its own image instead, and a mask discards
the product: loads need no branch, and a weight that is infinite meets no zero at the border.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from coalesce.heavy import HeavyOp
from coalesce.layout import AS_IS, Layout


def supports(op: HeavyOp) -> bool:
    """A filter or more for each of several channels."""
    if op.kind != "conv" or op.empty or op.params["batch_group_count"] > 1:
        return False
    return op.params["feature_group_count"] == op.lhs.shape[-1] > 1


def layout(op: HeavyOp) -> Layout:
    """[window.., 1, g*O] -> [window.., g, O]: a tap's weights lie as the channels that they multiply do."""
    *window, _, o = op.rhs.shape
    groups = op.params["feature_group_count"]
    return AS_IS.reshape((*window, groups, o // groups))


def run(op: HeavyOp, lhs: Any, rhs: Any) -> Any:
    """lhs [G,R,N,spatial..,C] x rhs [G,window..,C,O] -> [G,R,N,out..,C*O]."""
    g, r, n = lhs.shape[:3]
    dtype = accumulator(op)
    # Without the barrier XLA may make the operand anew for each tap, normalisation and all (compiled for an H100).
    x = lax.optimization_barrier(lhs.reshape(g, r * n, *lhs.shape[3:]))
    total = add_up(op, x.astype(dtype), rhs.astype(dtype))
    return total.astype(op.out.dtype).reshape(g, r, *op.out.shape)


def add_up(op: HeavyOp, x: Any, w: Any, axis: int = 0) -> Any:
    """The sum over the taps along the spatial axes from `axis` on, of which those before it are taken:
    x [G,N,out..,spatial..,C], w [G,window..,C,O] -> [G,N,out..,C,O]."""
    if axis == op.lhs.ndim - 2:
        g, c, o = w.shape
        return x[..., None] * w.reshape(g, *(1 for _ in op.lhs.shape[:-1]), c, o)
    total: Any = None
    for tap in range(op.rhs.shape[axis]):
        at, real = reads(op, axis, tap)
        part = add_up(op, take(x, at, axis + 2), lax.index_in_dim(w, tap, 1, keepdims=False), axis + 1)
        if not real.all():
            part = jnp.where(jnp.asarray(real).reshape(-1, *(1 for _ in part.shape[axis + 3 :])), part, 0)
        total = part if total is None else total + part
    return total


def reads(op: HeavyOp, axis: int, tap: int) -> tuple[np.ndarray, np.ndarray]:
    """(where, whether) a tap reads the operand for each result along an axis; where it does not, the nearest place."""
    p, size = op.params, op.lhs.shape[axis + 1]
    at = np.arange(op.out.shape[axis + 1]) * p["window_strides"][axis] + tap * p["rhs_dilation"][axis]
    at, between = np.divmod(at - p["padding"][axis][0], p["lhs_dilation"][axis])
    return np.clip(at, 0, size - 1), (between == 0) & (at >= 0) & (at < size)


def take(x: Any, at: np.ndarray, axis: int) -> Any:
    """The places `at` of an axis: known now, and all of them there."""
    if at.size == x.shape[axis] and (at == np.arange(at.size)).all():
        return x
    others = tuple(d for d in range(x.ndim) if d != axis)
    numbers = lax.GatherDimensionNumbers(offset_dims=others, collapsed_slice_dims=(axis,), start_index_map=(axis,))
    sizes = tuple(1 if d == axis else size for d, size in enumerate(x.shape))
    return lax.gather(x, jnp.asarray(at[:, None], jnp.int32), numbers, sizes, mode="promise_in_bounds")


def accumulator(op: HeavyOp) -> Any:
    """What sums are kept in: the result's dtype or the operand's, whichever is wider, and at least float32."""
    wide = max(op.out.dtype, op.lhs.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.dtype(jnp.float32) if jnp.issubdtype(wide, jnp.floating) and wide.itemsize < 4 else wide
