"""Depthwise convolutions as a sum over the window's taps: each a shifted, strided slice of the operand times the tap's
weights.

That is elementwise work, which XLA makes one loop together with what follows, a normalisation and an activation. It
reads and writes what its neighbours do, lanes first and channels last, where a library's convolution wants the lanes'
channels side by side. Nothing is multiplied by padding, so an infinite weight leaves the border finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from coalesce.heavy import HeavyOp
from coalesce.layout import AS_IS, Layout

Tap = tuple[int, ...]


def supports(op: HeavyOp) -> bool:
    """A filter or more for each of several channels, and no lhs dilation."""
    if op.kind != "conv" or op.empty or op.params["batch_group_count"] > 1:
        return False
    return op.params["feature_group_count"] == op.lhs.shape[-1] > 1 and set(op.params["lhs_dilation"]) == {1}


def layout(op: HeavyOp) -> Layout:
    """[window.., 1, g*O] -> [window.., g, O]: a tap's weights lie as the channels that they multiply do."""
    *window, _, o = op.rhs.shape
    groups = op.params["feature_group_count"]
    return AS_IS.reshape((*window, groups, o // groups))


def run(op: HeavyOp, lhs: Any, rhs: Any) -> Any:
    """lhs [G,R,N,spatial..,C] x rhs [G,window..,C,O] -> [G,R,N,out..,C*O]."""
    g, r, n = lhs.shape[:3]
    dtype = accumulator(op)
    read = shifts if keeps_places(op) else slices
    total = add_up(op, read(op, lhs.reshape(g, r * n, *lhs.shape[3:]), dtype), rhs.astype(dtype), ())
    return total.astype(op.out.dtype).reshape(g, r, *op.out.shape)


def add_up(op: HeavyOp, read: Callable[[Tap], Any], w: Any, tap: Tap) -> Any:
    """The sum over the taps that begin with `tap`: [G,N,out..,C,O]."""
    axis = len(tap)
    if axis == len(op.out.shape) - 2:
        part = w[(slice(None), *tap)]
        return read(tap)[..., None] * part.reshape(part.shape[0], *(1 for _ in op.out.shape[:-1]), *part.shape[1:])
    total: Any = None
    for step in range(op.rhs.shape[axis]):
        part = add_up(op, read, w, (*tap, step))
        if not (real := reads(op, axis, step)).all():
            part = jnp.where(jnp.asarray(real).reshape(-1, *(1 for _ in part.shape[axis + 3 :])), part, 0)
        total = part if total is None else total + part
    return total


def keeps_places(op: HeavyOp) -> bool:
    """Whether the result has the operand's size, and a tap is a shift of it."""
    return set(op.params["window_strides"]) == {1} and op.out.shape[1:-1] == op.lhs.shape[1:-1]


def shifts(op: HeavyOp, x: Any, dtype: Any) -> Callable[[Tap], Any]:
    """(tap) -> its operands, where a tap is a shift of an image's positions, laid on one axis.

    At a border it finds what lies next to it there, of the same image, or padding: `reads` says where.
    """
    size = op.lhs.shape[1:-1]

    def shift(tap: Tap) -> int:
        steps = zip(tap, op.params["rhs_dilation"], op.params["padding"], strict=True)
        return sum((t * d - lo) * prod(size[axis + 1 :]) for axis, (t, d, (lo, _)) in enumerate(steps))

    every = [shift(tap) for tap in np.ndindex(*op.rhs.shape[:-2])]
    before, after = max(0, -min(every)), max(0, max(every))
    flat = x.reshape(*x.shape[:2], prod(size), x.shape[-1])
    flat = padded(flat, [(before, after)]).astype(dtype)

    def read(tap: Tap) -> Any:
        start = before + shift(tap)
        return lax.slice_in_dim(flat, start, start + prod(size), 1, 2).reshape(x.shape)

    return read


def slices(op: HeavyOp, x: Any, dtype: Any) -> Callable[[Tap], Any]:
    """(tap) -> its operands, by a strided slice along each axis."""
    x = padded(x, op.params["padding"]).astype(dtype)

    def read(tap: Tap) -> Any:
        part = x
        for axis, (step, stride) in enumerate(zip(tap, op.params["window_strides"], strict=True)):
            start = step * op.params["rhs_dilation"][axis]
            part = lax.slice_in_dim(part, start, start + (op.out.shape[axis + 1] - 1) * stride + 1, stride, axis + 2)
        return part

    return read


def padded(x: Any, padding: Sequence[tuple[int, int]]) -> Any:
    """[G,N,positions..,C] with padding around its positions, as an array that exists: what makes `x` pads it too.

    Without the barrier XLA makes it anew for each tap, or asks at each tap whether it is padding. Loads are then one
    element wide, with branches between them (compiled for an H100).
    """
    if any(pad != (0, 0) for pad in padding):
        x = lax.pad(x, x.dtype.type(0), [(0, 0, 0), (0, 0, 0), *((lo, hi, 0) for lo, hi in padding), (0, 0, 0)])
    return lax.optimization_barrier(x)


def reads(op: HeavyOp, axis: int, tap: int) -> np.ndarray:
    """For which results along an axis a tap reads the operand, and no padding."""
    at = np.arange(op.out.shape[axis + 1]) * op.params["window_strides"][axis] + tap * op.params["rhs_dilation"][axis]
    at = at - op.params["padding"][axis][0]
    return (at >= 0) & (at < op.lhs.shape[axis + 1])


def accumulator(op: HeavyOp) -> Any:
    """What sums are kept in: the result's dtype or the operand's, whichever is wider, and at least float32."""
    wide = max(op.out.dtype, op.lhs.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.dtype(jnp.float32) if jnp.issubdtype(wide, jnp.floating) and wide.itemsize < 4 else wide
