"""What a warpgroup multiplies of a tile, and how its part of the result lies: tensor cores take 64 rows at a time.

    Upright   positions are rows: a warpgroup has some of them, and all columns
    Turned    columns are rows: a warpgroup has some of them, and all positions, of which there are any multiple of 8

197 rows of a ViT are 256 upright, in tiles of 64, and 200 turned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax
from jax.experimental import pallas as pl

from coalesce.kernels.mosaic import backend, Columns, GROUP, Images, load, Rows
from coalesce.kernels.mosaic_columns import Beside
from coalesce.kernels.mosaic_tile import Tile


@dataclass(frozen=True)
class Upright:
    tile: Tile

    @property
    def sums(self) -> tuple[int, int]:
        return self.tile.blocks.m // self.tile.groups, self.tile.blocks.n

    def multiply(
        self, acc: Any, group: Any, left: tuple[Images, Any], right: tuple[Rows | Columns, Any], at: At
    ) -> None:
        (images, lefts), (rows, rights), count = left, right, self.sums[0]
        first = group * count + self.tile.below(at.tap) * self.tile.wide
        a = images.rows(lefts, (at.left, at.d), first, count)
        backend().wgmma(acc, a, rows.part(rights, at.right, at.d))

    def parts(self, group: Any, images: Images, outs: Any) -> Iterator[Part]:
        row, count = self.tile.row, self.sums[0]
        for part in range(self.tile.parts):
            to = images.rows(outs, (part,), group * count, count)
            yield Part((slice(None), slice(part * row, (part + 1) * row)), part * row, row, to, self)

    def load(self, to: Any) -> Any:
        return load(to, backend().Layout.WGMMA)

    def store(self, to: Any, value: Any) -> None:
        to[...] = value

    def spread(self, vector: Any, shape: Sequence[int]) -> Any:
        """A vector over columns."""
        return lax.broadcast_in_dim(load(vector, backend().Layout.WGMMA.reduce(0)), shape, (1,))


@dataclass(frozen=True)
class Turned:
    tile: Tile

    @property
    def sums(self) -> tuple[int, int]:
        return self.tile.blocks.n // self.tile.groups, self.tile.blocks.m

    def multiply(
        self, acc: Any, group: Any, left: tuple[Images, Any], right: tuple[Rows | Columns, Any], at: At
    ) -> None:
        (images, lefts), (rows, rights), count = left, right, self.sums[0]
        b = images.rows(lefts, (at.left, at.d), self.tile.below(at.tap) * self.tile.wide, self.tile.blocks.m)
        a = rows.turned(rights, at.right, at.d, group * count, count)
        backend().wgmma(acc, a, b.transpose((1, 0)))

    def parts(self, group: Any, images: Images, outs: Any) -> Iterator[Part]:
        assert isinstance(images, Beside), "what other images hold is not read by columns"
        each = self.sums[0] // GROUP
        for i in range(each):
            column = (group * each + i) * GROUP
            yield Part((slice(i * GROUP, (i + 1) * GROUP), slice(None)), column, GROUP, (images, outs, column), self)

    def load(self, to: tuple[Beside, Any, Any]) -> Any:
        images, outs, column = to
        return images.load(outs, column)

    def store(self, to: tuple[Beside, Any, Any], value: Any) -> None:
        images, outs, column = to
        images.store(outs, column, value)

    def spread(self, vector: Any, shape: Sequence[int]) -> Any:
        return lax.broadcast_in_dim(load(vector, backend().Layout.WGMMA.reduce(1)), shape, (0,))


@dataclass(frozen=True)
class At:
    """A product of a step: the places of its operands, which tap of a column, which row's width of channels."""

    left: Any
    right: Any
    tap: int
    d: int


@dataclass(frozen=True)
class Part:
    """Some of a warpgroup's sums: where they are among them, at which column of the tile they begin, of how many, and
    where they go in shared memory, where an operand of the result's size lies before."""

    of: tuple[slice, slice]
    column: Any
    columns: int
    to: Any
    share: Upright | Turned

    def load(self) -> Any:
        return self.share.load(self.to)

    def store(self, value: Any) -> None:
        self.share.store(self.to, value)

    def spread(self, vector: Any, shape: Sequence[int]) -> Any:
        """A vector over the tile's columns: those of this part."""
        return self.share.spread(vector.at[pl.ds(self.column, self.columns)], shape)


def share_of(tile: Tile) -> Upright | Turned:
    return Turned(tile) if tile.blocks.turned else Upright(tile)
