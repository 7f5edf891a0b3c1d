"""Dots and convolutions as one Pallas kernel that reads each problem's weights where they lie.

    grid (tiles of the result, problems)
    a program: one tile, see coalesce.kernels.tiles

Rows of a bank may be picked, so that lanes come and go without moving weights, and weights may lie in a slab: see
coalesce.slab. Arrays above 4 GiB are addressed with 64 bits, which Pallas decides by their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels import as_product
from coalesce.kernels.epilogue import Epilogue, WHOLE
from coalesce.kernels.operands import Batched, Operands, operands_of
from coalesce.kernels.tiles import by_columns, Tiled
from coalesce.kernels.triton import launch
from coalesce.kernels.windows import power, row_of, Windows, windows_of
from coalesce.layout import AS_IS, Layout, pad_to
from coalesce.slab import Cut, Picked, Turn

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
    """[window.., I, O] or [B.., K.., N..] -> [K, N], or [N, K] of 32 bits, or [B, K, N] with batch dimensions. Few
    channels are padded, see coalesce.kernels.windows."""
    k = windows_of(op).k
    shape = (k, op.n) if op.batch == 1 else (op.batch, k, op.n)
    flat = AS_IS if k == op.k else row_padded(op)
    flat = flat if flat.of(op.rhs.shape) == shape else flat.reshape(shape)
    return flat.transpose((1, 0)) if by_columns(op) else flat


def row_padded(op: HeavyOp) -> Layout:
    """The taps of a row and the channels that are counted."""
    row, window = row_of(op), op.rhs.shape[:-3]
    behind = AS_IS.lead((*(0 for _ in window), row.before, 0, 0)) if row.before else AS_IS
    return behind.pad((*window, row.taps, row.channels, op.n))


def run(
    op: HeavyOp,
    lhs: Any,
    rhs: Any,
    epilogue: Epilogue | None = None,
    operands: Sequence[Any] = (),
    blocks: Blocks | None = None,
) -> Any:
    """lhs [G,R,*lhs] x rhs [G,*layout] -> [G,R,*out], or a list of what an epilogue leaves that takes columns apart.

    The rows of `rhs` may be picked, and it may be a cut of a slab; so may `operands` that are vectors [G,N], where the
    op has no batch dimensions.
    """
    product = product_of(op, lhs, rhs, epilogue, operands, blocks)

    def kernel(*refs: Any) -> None:
        count = len(product.args)
        product.write(pl.program_id(0), pl.program_id(1), refs[:count], refs[count:])

    grid, blocks = (product.tiled.count, product.problems), product.tiled.blocks
    ys = launch(kernel, grid, product.outs, product.args, name=product.name, warps=blocks.warps, stages=blocks.stages)
    results = [product.result(y) for y in ys]
    return results[0] if epilogue is None or epilogue.plain else results


@dataclass(frozen=True, eq=False)
class Product:
    """An op's problems, and what a launch hands to its kernel for them: the left operands [P, positions, C], and what
    may lie in slabs and be picked: weights [S, *layout], and what the epilogue reads."""

    tiled: Tiled
    groups: int
    lhs: Any
    operands: Operands

    @property
    def args(self) -> tuple[Any, ...]:
        return (*self.operands.scalars, self.lhs, *self.operands.arrays)

    @property
    def problems(self) -> int:
        return self.groups * self.tiled.op.batch

    @property
    def name(self) -> str:
        op = self.tiled.op
        return f"{op.kind}_{self.problems}x{self.tiled.rows}x{op.n}x{op.k}"

    @property
    def outs(self) -> list[jax.ShapeDtypeStruct]:
        return self.tiled.outs(self.problems)

    def write(self, tile: Any, problem: Any, refs: Sequence[Any], ys: Sequence[Any]) -> None:
        """Compute a tile of a problem; `refs` are references to `args`, `ys` to the results [P, rows, columns]."""
        first = len(self.operands.scalars)
        right, *given = self.operands.sources(refs[first + 1 :], refs[:first], problem)
        self.tiled.run(tile, problem, refs[first], right, given, ys)

    def result(self, y: Any) -> Any:
        """[P, rows, N] -> [G,R,*out]."""
        return as_product.result(self.tiled.op, y, self.groups, self.tiled.per_group)


def product_of(
    op: HeavyOp,
    lhs: Any,
    rhs: Any,
    epilogue: Epilogue | None = None,
    operands: Sequence[Any] = (),
    blocks: Blocks | None = None,
) -> Product:
    """What `run` runs, with the same arguments."""
    groups, per_group = lhs.shape[:2]
    x = positions(op, lhs)
    if blocks is None:
        blocks = blocks_for(per_group * op.m, op.n, windows_of(op), x.shape[0])
    return Product(Tiled(op, per_group, blocks, epilogue), groups, x, by_problem(op, rhs, epilogue, operands))


def positions(op: HeavyOp, lhs: Any) -> Any:
    """[G,R,*lhs] -> [P, positions, C]."""
    if op.kind == "dot":
        return as_product.left(op, lhs)
    x = lhs.reshape(lhs.shape[0], -1, op.lhs.shape[-1])
    x = pad_to(x, (*x.shape[:-1], row_of(op).channels))
    return x.reshape(lhs.shape[0], -1, windows_of(op).channels)


def by_problem(op: HeavyOp, rhs: Any, epilogue: Epilogue | None, operands: Sequence[Any]) -> Operands:
    """What a launch reads beside the left operands: the right ones, and those of the epilogue."""
    kinds = epilogue.kinds if epilogue else ()
    return operands_of([as_problems(op, rhs), *(as_rows(op, y, k) for y, k in zip(operands, kinds, strict=True))])


def as_problems(op: HeavyOp, rhs: Any) -> Any:
    """Right operands with a row for each problem, where batch dimensions make several of one; a row of a slab holds
    all of a lane's."""
    if op.batch == 1:
        return rhs
    if isinstance(rhs.array if isinstance(rhs, Picked) else rhs, Cut):
        return Batched(rhs, op.batch, op.k * op.n)
    if not isinstance(rhs, Picked):
        return rhs.reshape(-1, *rhs.shape[2:])
    slots = rhs.slots[:, None] * op.batch + jnp.arange(op.batch, dtype=rhs.slots.dtype)[None]
    return Picked(rhs.array.reshape(-1, *rhs.array.shape[2:]), slots.reshape(-1))


def as_rows(op: HeavyOp, y: Any, kind: str) -> Any:
    """An epilogue's operand by problem: [P, R*M, N], or columns [P, N], [P, R, N] for several lanes; of what is read
    step by step [P, steps, size]."""
    if isinstance(y, Turn):
        return replace(y, steps=y.steps.reshape(*y.steps.shape[:2], -1))
    if kind == WHOLE:
        return as_product.rows(op, y)
    if isinstance(y, Cut | Picked):
        return y
    y = jnp.repeat(y, op.batch, axis=0) if op.batch > 1 else y
    return y[:, 0] if y.shape[1] == 1 else y


def blocks_for(rows: int, columns: int, windows: Windows, problems: int) -> Blocks:
    """By rule, until tuned: tiles as large as the result, and no larger than leaves two for each of 132 cores."""
    m, n = (min(128, tile(size)) for size in (rows, columns))
    n = min(n, 64)
    while m > 32 and pl.cdiv(rows, m) * pl.cdiv(columns, n) * problems < 264:
        m //= 2
    return Blocks(m, n, min(64, tile(windows.channels if windows.channels >= 32 else windows.k)))


def tile(size: int) -> int:
    """The next power of two, 16 at least."""
    return max(16, power(size))
