"""What is done to the rows of values [lanes, rows, n] as one Pallas kernel: each row is read once, and whole.

    grid (blocks of rows, lanes)
    a program: the tiles [m, n] of what it reads, or [m, 1] and [1, n]; `work` on them; what of it others read

The work is the tenant's own equations, elementwise or over a row, in their own dtypes (`Tiles` of attention.py).
XLA makes two kernels of a norm by the mean and the mean of squares, of which the second reads the rows again. What it
reads of a bank is read where it lies, by slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from coalesce.kernels.attention import COLUMN, Dim, full, Place, ROW, unraveled
from coalesce.kernels.tiles import along, below, down
from coalesce.kernels.triton import both, div, launch, load, rem, store
from coalesce.kernels.windows import power

PROGRAM = 1024  # elements of a value: with four warps, 16 bytes a thread in 16 bits
LONGEST = 8192  # columns that registers hold
WARPS, MORE_WARPS, MANY = 4, 8, 4096  # more for rows of as many columns


@dataclass(frozen=True)
class Rows:
    """Rows of `n`, as many of a lane as `sizes` count. `work(*tiles, valid, columns)` gives a tile of each result, of
    so many columns or of one; `valid` masks those that there are, or is None."""

    sizes: tuple[int, ...]
    n: int
    work: Callable[..., Sequence[Any]]

    @property
    def count(self) -> int:
        return prod(self.sizes)

    @property
    def columns(self) -> int:
        return max(16, power(self.n))

    @property
    def block(self) -> int:
        return min(power(self.count), max(1, PROGRAM // self.columns))


def run(what: Rows, places: Sequence[Place], outs: Sequence[jax.ShapeDtypeStruct], lanes: int) -> Sequence[Any]:
    """The results, each [lanes, rows, n], or [lanes, rows] of what is one number for each row.

    The dimensions of what is read count one of `sizes`, or rows as they are numbered, or columns.
    """
    block, columns = what.block, what.columns
    counts = [len(place.arrays) for place in places]

    def kernel(*refs: Any) -> None:
        lane, found = pl.program_id(1), iter(refs)
        row = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
        column = jnp.arange(columns, dtype=jnp.int32)
        rows, valid = down(below(row, what.count, block)), along(below(column, what.n, columns))
        at: dict[Dim, Any] = {ROW: row[:, None], COLUMN: column[None, :], None: full(0)}
        at |= dict(enumerate(each(row[:, None], what.sizes)))

        def tile(place: Place) -> Any:
            ref = next(found)
            own = full(lane if place.slots is None else next(found)[lane])
            by_row = any(isinstance(dim, int) or dim == ROW for dim in place.dims)
            mask = both(rows if by_row else None, valid if COLUMN in place.dims else None)
            return load(ref, index(place, at, own), mask)

        results = what.work(*map(tile, places), valid=valid, columns=columns)
        for ref, out, result in zip(refs[sum(counts) :], outs, results, strict=True):
            whole = len(out.shape) == 3
            where = (full(lane), row[:, None], column[None, :]) if whole else (full(lane), row[:, None])
            value = jnp.broadcast_to(result, (block, columns if whole else 1))
            store(ref, where, value, both(rows, valid) if whole else rows)

    return launch(
        kernel,
        (pl.cdiv(what.count, block), lanes),
        outs,
        [array for place in places for array in place.arrays],
        name=f"rows_{lanes}x{what.count}x{what.n}",
        warps=MORE_WARPS if columns > MANY else WARPS,
        stages=1,
    )


def each(row: Any, sizes: Sequence[int]) -> list[Any]:
    """A row's place in each dimension."""
    return [div(row, prod(sizes[1:])), *unraveled(rem(row, prod(sizes[1:])), sizes[1:])] if sizes else []


def index(place: Place, at: dict[Dim, Any], lane: Any) -> tuple[Any, ...]:
    own = [at[dim] + start if start else at[dim] for dim, start in zip(place.dims, place.starts, strict=True)]
    if place.cut:
        start, shape = place.cut
        own = [sum((i * prod(shape[d + 1 :]) for d, i in enumerate(own)), full(start))]
    return (lane, *own) if place.by_lane else tuple(own)
