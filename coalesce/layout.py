"""How a weight lies in its bank: moves that each row goes through once, when it is written.

AS_IS                                       as the tenant's program has it
AS_IS.split(s).transpose(o).reshape(t)      other dimensions; elements only move
AS_IS.pad(s)                                zeros at the end of each dimension, up to shape s
AS_IS.lead(n)                               n zeros before the beginning of each dimension
AS_IS.rounded()                             float32 as TF32 has it, see coalesce.tf32
a.then(b)                                   the moves of a, then those of b
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax import lax

from coalesce.tf32 import nearest

Dims = tuple[int, ...]
ROUNDED: tuple[str, Dims] = ("rounded to TF32", ())


@dataclass(frozen=True)
class Layout:
    """A change of layout within a row; it moves elements and pads with zeros, and never repeats one. None changes but
    by rounding, for who multiplies no more of it."""

    moves: tuple[tuple[str, Dims], ...] = ()

    def split(self, shape: Dims) -> Layout:
        return Layout((*self.moves, ("split to", shape)))

    def transpose(self, order: Dims) -> Layout:
        return Layout((*self.moves, ("transposed by", order)))

    def reshape(self, shape: Dims) -> Layout:
        return Layout((*self.moves, ("as", shape)))

    def pad(self, shape: Dims) -> Layout:
        return Layout((*self.moves, ("padded to", shape)))

    def lead(self, count: Dims) -> Layout:
        return Layout((*self.moves, ("behind zeros", count)))

    def rounded(self) -> Layout:
        """float32 to what TF32 has."""
        return self if ROUNDED in self.moves else Layout((*self.moves, ROUNDED))

    def then(self, other: Layout) -> Layout:
        return Layout((*self.moves, *other.moves))

    def __call__(self, row: Any) -> Any:
        for move, dims in self.moves:
            match move:
                case "transposed by":
                    row = lax.transpose(row, dims)
                case "padded to":
                    row = pad_to(row, dims)
                case "behind zeros":
                    row = lax.pad(row, lax.full((), 0, row.dtype), [(n, 0, 0) for n in dims])
                case "rounded to TF32":
                    row = nearest(row)
                case _:
                    row = lax.reshape(row, dims)
        return row

    def of(self, shape: Dims) -> Dims:
        """The shape of a row in this layout."""
        for move, dims in self.moves:
            match move:
                case "transposed by":
                    shape = tuple(shape[d] for d in dims)
                case "behind zeros":
                    shape = tuple(size + n for size, n in zip(shape, dims, strict=True))
                case "rounded to TF32":
                    pass
                case _:
                    shape = dims
        return shape

    def __str__(self) -> str:
        texts = (move if (move, dims) == ROUNDED else f"{move} {list(dims)}" for move, dims in self.moves)
        return ", ".join(texts) or "as it is"


AS_IS = Layout()


def pad_to(x: Any, shape: Dims) -> Any:
    """`x` with zeros at the end of each dimension, up to `shape`; `x` itself if nothing is missing."""
    if tuple(x.shape) == tuple(shape):
        return x
    zero = lax.full((), 0, x.dtype)
    return lax.pad(x, zero, [(0, new - old, 0) for old, new in zip(x.shape, shape, strict=True)])
