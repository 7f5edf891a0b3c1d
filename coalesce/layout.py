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
        if self == Layout():
            return "as is"
        return "x".join(map(str, self.shape or self.split or ())) + (f" by {self.order}" if self.order else "")


AS_IS = Layout()
