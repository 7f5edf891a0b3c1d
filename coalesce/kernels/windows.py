"""Where a convolution's windows lie in its operand, so that a kernel can read them without copying them out first.

A convolution is the product [rows, K] x [K, N]: a row for each output position of each image, and K = (tap, channel).
The operand is [positions, channels], all images one after the other; a dot is the convolution with one tap, whose rows
are its positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from coalesce.heavy import HeavyOp
from coalesce.kernels.triton import both, div, rem


@dataclass(frozen=True)
class Windows:
    """Sizes by spatial dimension; all of them are () for a dot."""

    size: tuple[int, ...]  # of the operand
    out: tuple[int, ...]
    taps: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]  # padding at the start; negative: what is left out there
    channels: int

    @property
    def tap_count(self) -> int:
        return prod(self.taps)

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
        for d in reversed(range(len(self.taps))):
            steps.insert(0, rem(tap, self.taps[d]) * self.dilation[d])
            tap = div(tap, self.taps[d])
        for d, step in enumerate(steps):
            x = place[d] + step
            if not self.within(d):
                inside = both(inside, x >= 0, x < self.size[d])
            position = position * self.size[d] + x
        return position, inside


def windows_of(op: HeavyOp) -> Windows:
    if op.kind == "dot":
        return Windows((), (), (), (), (), (), op.k)
    p = op.params
    return Windows(
        size=tuple(op.lhs.shape[1:-1]),
        out=tuple(op.out.shape[1:-1]),
        taps=tuple(op.rhs.shape[:-2]),
        strides=tuple(p["window_strides"]),
        dilation=tuple(p["rhs_dilation"]),
        before=tuple(lo for lo, _ in p["padding"]),
        channels=op.lhs.shape[-1],
    )
