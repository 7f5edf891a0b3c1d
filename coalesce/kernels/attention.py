"""Two products and what is done to each row between them as one Pallas kernel, in which no score is written to memory.

    grid (blocks of rows, lanes x heads)
    a program: scores = q [m, k] * k [k, n]; weights = rowwise(scores), whole rows at once; weights * v [n, d]

The rows' work is the tenant's own equations, on scores rounded as its own product rounds them: a softmax, with whatever
scale, bias or mask. Every operand is read where it lies, whatever the order of its dimensions, and so is the result
written. Rows are whole, so what a core holds bounds how many columns there can be (`fits`); longer ones would want a
softmax that is known to be one (Dao et al., FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from coalesce import jaxpr as J
from coalesce.heavy import HeavyOp
from coalesce.kernels.epilogue import on_tile
from coalesce.kernels.indexed_gemm import tile as tile_size
from coalesce.kernels.tiles import along, below, down, precision_of
from coalesce.kernels.triton import both, div, dot, launch, load, rem, store
from coalesce.kernels.windows import power

ROW, COLUMN = "row", "column"
Dim = int | str | None  # what a dimension counts: one of the batch, rows or columns of the tile; None: of size one

HELD_BYTES = 160 * 1024  # of the right operands of a head, in the memory of a core
TILE = 16384  # scores in registers

# What makes one number of each row, and what padding counts as.
REDUCTIONS = {"reduce_max": -np.inf, "reduce_min": np.inf, "reduce_sum": 0.0}
# What changes nothing but the shape.
SAME = frozenset({"broadcast_in_dim", "copy", "expand_dims", "reshape", "squeeze", "stop_gradient"})


@dataclass(frozen=True)
class Place:
    """An array [lanes, *dims], or one without lanes; what is read of it begins at `starts`. With a `cut` it lies flat
    in an array [lanes, size]: where, and in which shape. With `slots` [lanes] lane i reads row slots[i]."""

    array: Any
    dims: tuple[Dim, ...]
    by_lane: bool = True
    starts: tuple[int, ...] = ()
    cut: tuple[int, tuple[int, ...]] | None = None
    slots: Any = None

    @property
    def arrays(self) -> tuple[Any, ...]:
        return (self.array,) if self.slots is None else (self.array, self.slots)


@dataclass(frozen=True)
class Operand:
    """A tile that is made of tiles of some arrays: by `make`, or of one array as it is."""

    places: tuple[Place, ...]
    make: Callable[[Sequence[Any]], Any] | None = None

    @property
    def arrays(self) -> list[Any]:
        return [array for place in self.places for array in place.arrays]


@dataclass(frozen=True)
class Attention:
    """Of each head of a lane: scores [m, n] over k, results [m, d]. `rowwise(scores, given, valid, rows)` gives weights
    for scores, which come in tiles of some columns each, as everything of `given` does; `valid` masks the columns that
    there are in a tile, or is None, and `rows` does an equation, as Tiles. `finish` is done to results as they are
    written."""

    scores: HeavyOp
    values: HeavyOp
    d: int
    rowwise: Callable[..., Any]
    batch: tuple[int, ...]  # of heads
    finish: Callable[[Any], Any] = lambda x: x

    @property
    def rows(self) -> int:
        """Of a program: as many as registers hold, or half of them where that pads a tenth less. On an H200 197 rows
        take 15.8 us by 32, 20.2 by 64, which are 256 then, 18.1 by 16 and 16.5 by 128."""
        most = max(16, min(64, power(self.scores.m), TILE // tile_size(self.scores.n)))
        half = max(16, most // 2)
        return half if padded(self.scores.m, half) <= 0.9 * padded(self.scores.m, most) else most


def padded(size: int, block: int) -> int:
    return pl.cdiv(size, block) * block


def fits(scores: HeavyOp, d: int) -> bool:
    """Whether a core holds the right operands of a head, and some whole rows of scores."""
    n = tile_size(scores.n)
    held = n * (tile_size(scores.k) + tile_size(d)) * scores.lhs.dtype.itemsize
    return held <= HELD_BYTES and 16 * n <= TILE


def run(what: Attention, operands: Sequence[Operand], out: Place, lanes: int) -> Any:
    """The result, as `out.array` says, a ShapeDtypeStruct.

    `operands` are q, k, v and what the rows' work reads. By rows and columns of their tiles: q [m, k], k [k, n],
    v [n, d], out [m, d]; the others [m, n], or of one row or column.
    """
    scores, heads, block = what.scores, prod(what.batch), what.rows
    counts = [len(operand.arrays) for operand in operands]
    firsts = [sum(counts[:i]) for i in range(len(counts))]

    def kernel(*refs: Any) -> None:
        problem = pl.program_id(1)
        at = At(div(problem, heads), unraveled(rem(problem, heads), what.batch))
        m = Axis(pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32), scores.m, block)
        k, n, d = map(all_of, (scores.k, scores.n, what.d))

        def tile(which: int, rows: Axis, columns: Axis) -> Any:
            first, operand = firsts[which], operands[which]
            found = at.tile(operand, refs[first : first + counts[which]], rows, columns, multiplied=which < 3)
            return jnp.broadcast_to(found, (rows.block, columns.block))

        found = dot(tile(0, m, k), tile(1, k, n), precision_of(scores)).astype(scores.out.dtype)
        given = [tile(i, m, n) for i in range(3, len(operands))]
        valid = along(n.inside)
        (weights,) = what.rowwise([found], [[x] for x in given], [valid], Tiles)
        if valid is not None:  # what comes of padding may be no number
            weights = jnp.where(valid, weights, jnp.zeros_like(weights))
        result = dot(weights, tile(2, n, d), precision_of(what.values))
        index, mask = at.place(out, m, d)
        store(refs[-1], index, what.finish(result.astype(out.array.dtype)), mask)

    (result,) = launch(
        kernel,
        (pl.cdiv(scores.m, block), lanes * heads),
        [jax.ShapeDtypeStruct(out.array.shape, out.array.dtype)],
        [array for operand in operands for array in operand.arrays],
        name=f"attention_{lanes * heads}x{scores.m}x{scores.n}x{scores.k}",
        warps=8 if block * tile_size(scores.n) > TILE // 2 else 4,
        stages=1,
    )
    return result


@dataclass(frozen=True)
class Axis:
    """The rows or columns of a tile: which they are, of how many."""

    index: Any
    size: int
    block: int

    @property
    def inside(self) -> Any:
        return below(self.index, self.size, self.block)


@dataclass(frozen=True)
class At:
    """A head of a lane."""

    lane: Any
    batch: Sequence[Any]

    def place(self, place: Place, rows: Axis, columns: Axis) -> tuple[tuple[Any, ...], Any]:
        """(index, mask) of a tile's elements."""
        at: dict[Dim, Any] = {ROW: rows.index[:, None], COLUMN: columns.index[None, :], None: full(0)}
        own = [full(self.batch[dim]) if isinstance(dim, int) else at[dim] for dim in place.dims]
        if place.starts:
            own = [index + start if start else index for index, start in zip(own, place.starts, strict=True)]
        row_mask = down(rows.inside) if ROW in place.dims else None
        mask = both(row_mask, along(columns.inside) if COLUMN in place.dims else None)
        if place.cut:
            start, shape = place.cut
            own = [sum((i * prod(shape[at + 1 :]) for at, i in enumerate(own)), full(start))]
        return tuple([full(self.lane), *own] if place.by_lane else own), mask

    def tile(self, operand: Operand, refs: Sequence[Any], rows: Axis, columns: Axis, multiplied: bool) -> Any:
        """Of what is multiplied, padding is zero."""
        found, tiles = iter(refs), []
        for place in operand.places:
            ref = next(found)
            at = self if place.slots is None else replace(self, lane=next(found)[self.lane])
            tiles.append(load(ref, *at.place(place, rows, columns)))
        if operand.make is None and (not multiplied or {ROW, COLUMN} <= set(operand.places[0].dims)):
            return tiles[0]
        made = tiles[0] if operand.make is None else jnp.asarray(operand.make(tiles))
        inside = both(down(rows.inside), along(columns.inside))  # a number for a whole row or column says nothing of it
        return made if inside is None else jnp.where(inside, made, jnp.zeros_like(made))


def full(number: Any) -> Any:
    return jnp.full((1, 1), number, jnp.int32)


def all_of(size: int) -> Axis:
    return Axis(jnp.arange(tile_size(size), dtype=jnp.int32), size, tile_size(size))


def unraveled(number: Any, sizes: Sequence[int]) -> list[Any]:
    """The index of each dimension."""
    found: list[Any] = []
    for size in reversed(sizes):
        found.insert(0, rem(number, size))
        number = div(number, size)
    return found


def on_rows(eqn: J.Eqn, args: Sequence[Any]) -> Any:
    """An elementwise equation on tiles: [m, n], or [m, 1] and [1, n] of what is one number for each row or column."""
    shape = jnp.broadcast_shapes(*map(jnp.shape, args))
    return on_tile(eqn, [jnp.broadcast_to(x, shape) for x in args])


class Tiles:
    """The rows' work on tiles; what is one number for each row is [m, 1]."""

    @staticmethod
    def on(eqn: J.Eqn, args: Sequence[Any]) -> Any:
        return args[0] if eqn.primitive.name in SAME else on_rows(eqn, args)

    @staticmethod
    def spread(x: Any, shape: Sequence[int]) -> Any:
        return jnp.broadcast_to(x, shape)

    @staticmethod
    def reduced(eqn: J.Eqn, tiles: Sequence[Any], valid: Sequence[Any]) -> Any:
        """Of the one tile that has all columns."""
        (x,), (own,) = tiles, valid
        return reduced(eqn.primitive.name, x, own).astype(J.dtype(eqn.outvars[0]))


def reduced(name: str, x: Any, valid: Any) -> Any:
    """Each row's number, in float32 as XLA computes it: [m, n] -> [m, 1]."""
    x = x.astype(jnp.float32)
    kept = x if valid is None else jnp.where(valid, x, jnp.full_like(x, REDUCTIONS[name]))
    if name == "reduce_sum":
        return jnp.sum(kept, axis=1)[:, None]
    least = (jnp.max if name == "reduce_max" else jnp.min)(kept, axis=1)[:, None]
    # Triton's own passes over what is no number, XLA's does not.
    no_number = jnp.max(jnp.where(kept == kept, 0.0, 1.0), axis=1)[:, None]
    return jnp.where(no_number > 0.0, jnp.full_like(least, np.nan), least)
