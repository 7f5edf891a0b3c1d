"""How a weight lies in its bank: a permutation, then a reshape, of each row.

Layout()                          as the tenant's program has it
Layout(split, order, shape)       row.reshape(split).transpose(order).reshape(shape)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax import lax


@dataclass(frozen=True)
class Layout:
    """An in-row change of layout; it moves elements and never changes or repeats one."""

    split: tuple[int, ...] | None = None  # the shape before the permutation
    order: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    def __call__(self, row: Any) -> Any:
        if self.split is not None:
            row = lax.reshape(row, self.split)
        if self.order is not None:
            row = lax.transpose(row, self.order)
        return lax.reshape(row, self.shape) if self.shape is not None else row

    def of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a row in this layout."""
        if self.shape is not None:
            return self.shape
        shape = self.split if self.split is not None else shape
        return tuple(shape[d] for d in self.order) if self.order is not None else shape

    def __str__(self) -> str:
        moves = [f"split to {list(self.split)}"] if self.split is not None else []
        moves += [f"transposed by {list(self.order)}"] if self.order is not None else []
        moves += [f"as {list(self.shape)}"] if self.shape is not None else []
        return ", ".join(moves) or "as it is"


AS_IS = Layout()
