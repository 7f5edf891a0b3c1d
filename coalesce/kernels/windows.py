"""Where a convolution's windows lie in its operand, so that a kernel can read them without copying them out first.

A convolution is the product [rows, K] x [K, N]: a row for each output position of each image, and K = (tap, channel).
The operand is [positions, channels], all images one after the other; a dot is the convolution with one tap, whose rows
are its positions.

Few channels, as of an image, leave a kernel nothing to load at once: 7 taps of 3 channels are 21 elements that begin
anywhere. So they are padded to a power of two, and the taps of a window's row are counted to one: 8 taps of 4 channels,
of which the last tap is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from coalesce.heavy import HeavyOp
from coalesce.kernels.triton import both, div, rem

FEW = 8  # channels: 16 bytes of bfloat16, one load
FEWEST = 4


@dataclass(frozen=True)
class Windows:
    """Sizes by spatial dimension; all of them are () for a dot."""

    size: tuple[int, ...]  # of the operand
    out: tuple[int, ...]
    taps: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]  # padding at the start; negative: what is left out there
    channels: int  # with those that pad them
    in_a_row: int  # how far the taps of the last dimension count

    @property
    def tap_count(self) -> int:
        return prod(self.taps[:-1]) * self.in_a_row

    @property
    def k(self) -> int:
        return self.tap_count * self.channels

    def within(self, d: int) -> bool:
        """Whether no window reaches beyond the operand in a dimension."""
        last = (self.out[d] - 1) * self.strides[d] + (self.taps[d] - 1) * self.dilation[d] - self.before[d]
        return self.before[d] <= 0 and last < self.size[d]

    def corners(self, row: Any) -> tuple[Any, list[Any]]:
        """(image, the first tap's place in each dimension) of rows."""
        place: list[Any] = []
        for d in reversed(range(len(self.out))):
            place.insert(0, rem(row, self.out[d]) * self.strides[d] - self.before[d])
            row = div(row, self.out[d])
        return row, place

    def at(self, corners: tuple[Any, list[Any]], tap: Any) -> tuple[Any, Any]:
        """(position, whether it lies in the operand) of a tap; outside of it the position means nothing. None where
        every window lies in the operand."""
        position, place = corners
        inside: Any = None
        steps: list[Any] = []
        for d, count in reversed(list(enumerate((*self.taps[:-1], self.in_a_row)[: len(self.taps)]))):
            step, tap = rem(tap, count), div(tap, count)
            steps.insert(0, step * self.dilation[d])
            if count > self.taps[d]:
                inside = both(inside, step < self.taps[d])
        for d, step in enumerate(steps):
            x = place[d] + step
            if not self.within(d):
                inside = both(inside, x >= 0, x < self.size[d])
            position = position * self.size[d] + x
        return position, inside


def windows_of(op: HeavyOp) -> Windows:
    if op.kind == "dot":
        return Windows((), (), (), (), (), (), op.k, 1)
    p = op.params
    in_a_row, channels = padded(op)
    return Windows(
        size=tuple(op.lhs.shape[1:-1]),
        out=tuple(op.out.shape[1:-1]),
        taps=tuple(op.rhs.shape[:-2]),
        strides=tuple(p["window_strides"]),
        dilation=tuple(p["rhs_dilation"]),
        before=tuple(lo for lo, _ in p["padding"]),
        channels=channels,
        in_a_row=in_a_row,
    )


def padded(op: HeavyOp) -> tuple[int, int]:
    """How far a convolution's taps of a row and its channels are counted: as far as there are any, or to powers of two
    where channels are few, unless that makes more than twice as much of them."""
    taps, channels = op.rhs.shape[-3:-1]
    counts = power(taps), power(max(channels, FEWEST))
    worth = taps > 1 and channels < FEW and prod(counts) <= 2 * taps * channels
    return counts if worth else (taps, channels)


def power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()
