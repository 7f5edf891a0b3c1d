"""What a program of mosaic_gemm computes and fetches, from an op's sizes and a tuner's blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jax.experimental import pallas as pl

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels.mosaic import GROUP, ROW_BYTES, SHARED_BYTES
from coalesce.kernels.mosaic_registers import equal_share
from coalesce.kernels.tiles import by_columns
from coalesce.kernels.windows import Windows, windows_of

WIDEST = 256  # positions that one copy can take in, along each dimension
LEFT_STAGES = 3  # where each left block is multiplied by several right ones
SUMS = 128  # float32 sums of a thread: half of its registers
OTHERS = 28  # registers of a thread besides: with 24 ptxas has too few
VECTORS = 3 * 1024  # bytes of shared memory for vectors of the epilogue
BARRIERS = 1024


class Band(NamedTuple):
    """Rows of an image that a tile needs for some taps of a column: every stride-th one, and with those that any of
    the taps adds. For a row h of the result the first of these taps reads the row (h + first) * stride + phase."""

    phase: int
    first: int
    begin: int  # where in the left block
    count: int


@dataclass(frozen=True)
class Tile:
    """`tall` x `wide` positions of one image by blocks.n columns. A dot's rows are an image of height 1.

    A left block is fetched for each column of taps, with the rows of positions that all taps of the column read; each
    is multiplied by as many right blocks as the column has taps. With strides an image is read as [H / stride, stride,
    W / stride, stride, C], so that neighbours of a tile are neighbours there too.
    """

    op: HeavyOp
    blocks: Blocks
    tall: int
    wide: int

    @cached_property
    def windows(self) -> Windows:
        return windows_of(self.op)

    @property
    def size(self) -> tuple[int, int]:
        """Of an image of the left operand."""
        return two(self.windows.size, (1, self.op.m))

    @property
    def out(self) -> tuple[int, int]:
        return two(self.windows.out, (1, self.op.m))

    @property
    def taps(self) -> tuple[int, int]:
        return two(self.windows.taps, (1, 1))

    @property
    def before(self) -> tuple[int, int]:
        return two(self.windows.before, (0, 0))

    @property
    def strides(self) -> tuple[int, int]:
        return two(self.windows.strides, (1, 1))

    @property
    def outside(self) -> tuple[int, int]:
        """How far the first windows reach beyond the image, in strides."""
        return -(-self.before[0] // self.strides[0]), -(-self.before[1] // self.strides[1])

    @property
    def channels(self) -> int:
        return self.windows.channels

    @property
    def row(self) -> int:
        """Elements of a swizzled row."""
        return ROW_BYTES // self.op.lhs.dtype.itemsize

    @property
    def by_columns(self) -> bool:
        """Whether weights lie as [N, K], rather than [K, N]."""
        return by_columns(self.op)

    @property
    def length(self) -> int:
        """Elements of a row of weights."""
        return self.op.k if self.by_columns else self.op.n

    @property
    def deep(self) -> int:
        """Rows' widths of channels that a block takes in."""
        return self.blocks.k // self.row

    @property
    def groups(self) -> int:
        """Warpgroups that multiply, one below the other."""
        return self.blocks.warps // 4

    @property
    def most_sums(self) -> int:
        """Of a thread, which is compiled for an equal share of the registers, whatever it has once it runs."""
        return min(SUMS, equal_share(self.groups) - OTHERS)

    @property
    def across(self) -> int:
        return pl.cdiv(self.out[1], self.wide)

    @property
    def count(self) -> int:
        """Tiles of an image."""
        return pl.cdiv(self.out[0], self.tall) * self.across

    @property
    def steps(self) -> int:
        """Left blocks."""
        return self.channels // self.blocks.k * self.taps[1]

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """A left block, one below the other."""
        found: dict[int, list[int]] = {}
        for tap in range(self.taps[0]):
            first, phase = divmod(tap - self.before[0], self.strides[0])
            found.setdefault(phase, []).append(first)
        bands: list[Band] = []
        for phase, firsts in found.items():
            begin = bands[-1].begin + bands[-1].count if bands else 0
            bands.append(Band(phase, firsts[0], begin, self.tall + firsts[-1] - firsts[0]))
        return tuple(bands)

    def below(self, tap: int) -> int:
        """How many rows of a left block lie above what the tap of a column reads."""
        first, phase = divmod(tap - self.before[0], self.strides[0])
        return next(band.begin + first - band.first for band in self.bands if band.phase == phase)

    @property
    def halo(self) -> int:
        """Rows of positions in a left block."""
        return sum(band.count for band in self.bands)

    @cached_property
    def right_stages(self) -> int:
        """As many as the blocks say, or as there is work or room for; 0 if there is room for too few: a place is freed
        when the next block has been multiplied, so that one place alone would be waited for without an end."""
        work = self.steps * self.taps[0]
        most, fewest = min(self.blocks.stages, work), min(2, work)
        return next((own for own in range(most, fewest - 1, -1) if self.bytes_with(own) <= SHARED_BYTES), 0)

    @property
    def left_stages(self) -> int:
        return self.left_beside(self.right_stages)

    def left_beside(self, right: int) -> int:
        return min(right if self.taps[0] == 1 else LEFT_STAGES, self.steps)

    @property
    def parts(self) -> int:
        """Rows' widths of columns."""
        return self.blocks.n // self.row

    @property
    def shared_bytes(self) -> int:
        return self.bytes_with(self.right_stages)

    def bytes_with(self, stages: int) -> int:
        left = self.left_beside(stages) * self.deep * self.halo * self.wide * ROW_BYTES
        right = stages * self.blocks.k * self.blocks.n * self.op.lhs.dtype.itemsize
        result = self.blocks.m * self.parts * ROW_BYTES
        held = max(left + right, result) if self.blocks.over else left + right + result
        return held + VECTORS + BARRIERS

    @property
    def fits(self) -> bool:
        blocks = self.blocks
        if blocks.warps % 4:  # no whole warpgroups
            return False
        rows, columns = (8, GROUP * self.groups) if blocks.turned else (GROUP * self.groups, self.row)
        sums = blocks.m * blocks.n // (32 * blocks.warps)
        whole = blocks.m % rows == 0 == blocks.n % columns and sums <= self.most_sums
        whole = whole and not (blocks.turned and blocks.m > WIDEST)
        divides = self.channels % blocks.k == 0 and self.op.n % blocks.n == 0
        divides = divides and blocks.k % self.row == 0
        largest = max(*(band.count for band in self.bands), self.wide, blocks.n) <= WIDEST
        return whole and divides and largest and self.right_stages > 0


def tile_of(op: HeavyOp, blocks: Blocks) -> Tile | None:
    """The tile of blocks.m positions that covers an image with the fewest, and of these the widest; None if an op has
    none of that size."""
    if op.kind == "dot":
        shapes = [(1, blocks.m)]
    else:
        shapes = [(blocks.m // wide, wide) for wide in (8, 16, 32, 64, 128, 256) if blocks.m % wide == 0]
    tiles = [tile for shape in shapes if (tile := Tile(op, blocks, *shape)).fits]
    return min(tiles, key=lambda tile: (tile.count, -tile.wide), default=None)


def two(sizes: tuple[int, ...], of_a_dot: tuple[int, int]) -> tuple[int, int]:
    return (sizes[0], sizes[1]) if sizes else of_a_dot
