"""Dots and convolutions as one Pallas kernel that reads each problem's weights where they lie: no copy of a window, a
patch or a weight is made.

    grid (tiles of the result, problems)
    a program: for its tile's rows and columns, sum over blocks of K of rows [m, k] x weights[slot] [k, n], epilogue

`slots[g]` is the row of the bank that problem g reads, so lanes may come and go without moving weights. Arrays above
4 GiB are addressed with 64 bits, which Pallas decides by their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels import as_product
from coalesce.kernels.epilogue import Epilogue, WHOLE
from coalesce.kernels.triton import div, dot, launch, load, rem, store
from coalesce.kernels.windows import Windows, windows_of
from coalesce.layout import AS_IS, Layout

FLOATS = ("float32", "bfloat16", "float16")
PRECISIONS = (None, lax.Precision.DEFAULT, lax.Precision.HIGHEST)  # others sum several products of parts


def supports(op: HeavyOp) -> bool:
    dtype = str(op.lhs.dtype)
    if dtype not in FLOATS or op.rhs.dtype != op.lhs.dtype or str(op.out.dtype) not in FLOATS or op.empty:
        return False
    precision = op.precision if isinstance(op.precision, tuple) else (op.precision,) * 2
    if precision[0] != precision[1] or precision[0] not in PRECISIONS:
        return False
    if op.kind == "dot":
        return op.k > 0
    grouped = op.params["feature_group_count"] > 1 or op.params["batch_group_count"] > 1
    return not grouped and set(op.params["lhs_dilation"]) == {1}


def layout(op: HeavyOp) -> Layout:
    """[window.., I, O] or [B.., K.., N..] -> [K, N], or [B, K, N] with batch dimensions."""
    shape = (op.k, op.n) if op.batch == 1 or op.kind == "conv" else (op.batch, op.k, op.n)
    return AS_IS if op.rhs.shape == shape else AS_IS.reshape(shape)


def run(
    op: HeavyOp,
    lhs: Any,
    rhs: Any,
    slots: Any = None,
    epilogue: Epilogue | None = None,
    operands: Sequence[Any] = (),
    blocks: Blocks | None = None,
) -> Any:
    """lhs [G,R,*lhs] x rhs [S,(B,)K,N] at slots [G] -> [G,R,*out]; without slots problem g reads row g."""
    groups, per_group = lhs.shape[:2]
    windows = windows_of(op)
    if op.kind == "dot":
        x, w = as_product.left(op, lhs), rhs.reshape(-1, op.k, op.n)
        if slots is not None and op.batch > 1:
            slots = (slots[:, None] * op.batch + jnp.arange(op.batch, dtype=slots.dtype)[None]).reshape(-1)
    else:
        x, w = lhs.reshape(groups, -1, windows.channels), rhs
    given = [as_rows(op, y, kind) for y, kind in zip(operands, epilogue.kinds if epilogue else (), strict=True)]
    blocks = blocks or blocks_for(per_group * op.m, op.n, windows, x.shape[0])
    return as_product.result(op, gemm(op, windows, x, w, slots, epilogue, given, per_group, blocks), groups, per_group)


def as_rows(op: HeavyOp, y: Any, kind: str) -> Any:
    """An epilogue's operand by problem: [G*B, R*M, N], or [G*B, R, N] of columns."""
    if kind == WHOLE:
        return as_product.rows(op, y)
    return jnp.repeat(y, op.batch, axis=0) if op.batch > 1 else y


def blocks_for(rows: int, columns: int, windows: Windows, problems: int) -> Blocks:
    """By rule, until tuned: tiles as large as the result, and no larger than leaves two for each of 132 cores."""
    m, n = (min(128, power(size)) for size in (rows, columns))
    n = min(n, 64)
    while m > 32 and pl.cdiv(rows, m) * pl.cdiv(columns, n) * problems < 264:
        m //= 2
    return Blocks(m, n, min(64, power(windows.channels if windows.channels >= 32 else windows.k)))


def power(size: int) -> int:
    """The next power of two, 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def gemm(
    op: HeavyOp,
    windows: Windows,
    x: Any,
    w: Any,
    slots: Any,
    epilogue: Epilogue | None,
    operands: Sequence[Any],
    per_group: int,
    blocks: Blocks,
) -> Any:
    """x [P, positions, C] x w [S, K, N] at slots [P] -> [P, rows, N]."""
    problems, rows, columns = x.shape[0], per_group * op.m, op.n
    precision = op.precision[0] if isinstance(op.precision, tuple) else op.precision
    out = jax.ShapeDtypeStruct((problems, rows, columns), epilogue.dtype if epilogue else op.out.dtype)
    across = pl.cdiv(columns, blocks.n)
    grid = (pl.cdiv(rows, blocks.m) * across, problems)

    def kernel(*refs: Any) -> None:
        at, problem = pl.program_id(0), pl.program_id(1)
        *slots_ref, x_ref, w_ref = refs[: len(refs) - len(operands) - 1]
        given, y_ref = refs[len(refs) - len(operands) - 1 : -1], refs[-1]
        slot = slots_ref[0][problem] if slots_ref else problem
        m = div(at, across) * blocks.m + jnp.arange(blocks.m, dtype=jnp.int32)
        n = rem(at, across) * blocks.n + jnp.arange(blocks.n, dtype=jnp.int32)
        mask = (m < rows)[:, None] & (n < columns)[None, :]
        y = tile(windows, x_ref, w_ref, problem, slot, m, n, rows, precision, blocks).astype(op.out.dtype)
        if epilogue:
            lane = div(m, op.m)
            places = [(problem, (m if kind == WHOLE else lane)[:, None], n[None, :]) for kind in epilogue.kinds]
            y = epilogue.apply(y, *(load(ref, place, mask) for ref, place in zip(given, places, strict=True)))
        store(y_ref, (problem, m[:, None], n[None, :]), y, mask)

    args = (*(() if slots is None else (slots.astype(jnp.int32),)), x, w, *operands)
    name = f"{op.kind}_{problems}x{rows}x{columns}x{op.k}"
    (y,) = launch(kernel, grid, [out], args, name=name, warps=blocks.warps, stages=blocks.stages)
    return y


def tile(
    windows: Windows,
    x_ref: Any,
    w_ref: Any,
    problem: Any,
    slot: Any,
    m: Any,
    n: Any,
    rows: int,
    precision: Any,
    blocks: Blocks,
) -> Any:
    """Rows m and columns n of one problem's product, in float32."""
    corners = windows.corners(m)
    channels, columns = windows.channels, w_ref.shape[-1]
    by_tap = pl.cdiv(channels, blocks.k)
    ranged = jnp.arange(blocks.k, dtype=jnp.int32)
    # A block of K within one tap has one position a row. Where channels are few, blocks take several taps instead.
    whole_taps = by_tap * blocks.k * 3 <= channels * 4 or windows.tap_count == 1
    steps = windows.tap_count * by_tap if whole_taps else pl.cdiv(windows.k, blocks.k)

    def step(i: Any, total: Any) -> Any:
        if whole_taps:
            c = rem(i, by_tap) * blocks.k + ranged
            tap = div(i, by_tap)
            k, fits = tap * channels + c, c < channels
            position, inside = windows.at(corners, tap)
            position, inside = position[:, None], inside[:, None]
        else:
            k = i * blocks.k + ranged
            c, fits = rem(k, channels), k < windows.k
            image, place = corners
            spread = image[:, None], [p[:, None] for p in place]
            position, inside = windows.at(spread, div(k, channels)[None, :])
        mask = inside & (m < rows)[:, None] & fits[None, :]
        a = load(x_ref, (problem, position, c[None, :]), mask)
        b = load(w_ref, (slot, k[:, None], n[None, :]), fits[:, None] & (n < columns)[None, :])
        return total + dot(a, b, precision)

    return lax.fori_loop(0, steps, step, jnp.zeros((blocks.m, blocks.n), jnp.float32))
