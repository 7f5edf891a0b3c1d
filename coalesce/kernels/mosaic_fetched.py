"""Tiles of arrays with lanes and heads, as TMA copies them: see coalesce.kernels.attention.Place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from coalesce.kernels.attention import COLUMN, Dim, Place, ROW

MOST = 5  # dimensions of what TMA copies, with that of the lanes
STEP_BYTES = 16  # of all but the last dimension it steps by multiples of that

Span = tuple[Any, int]  # where it begins, and how long it is


@dataclass(frozen=True)
class Fetched:
    """A view [lanes, *dims] without dimensions of size one; its lanes are one if there is one array for all."""

    view: jax.ShapeDtypeStruct
    dims: tuple[Dim, ...]
    starts: tuple[int, ...]
    by_lane: bool

    def index(
        self, lane: Any, batch: Sequence[Any], rows: Span, columns: Span, first: Callable[[Any], Any]
    ) -> tuple[Any, ...]:
        """Of a tile; `first` is what the lane's index becomes."""
        spans = {ROW: rows, COLUMN: columns}
        own: list[Any] = []
        for dim, start in zip(self.dims, self.starts, strict=True):
            if isinstance(dim, int):
                own.append(batch[dim] + start)
            elif dim is None:  # one of several, the same for all
                own.append(start)
            else:
                begin, size = spans[dim]
                own.append(pl.ds(begin + start, size))
        return (first(lane if self.by_lane else 0), *own)

    def extended(self, dim: Dim, count: int) -> tuple[Fetched, list[tuple[int, int]]]:
        """With so many rows or columns from the start on, and how an array is padded to that."""
        axis = 1 + self.dims.index(dim)
        shape = list(self.view.shape)
        missing = max(0, self.starts[axis - 1] + count - shape[axis])
        shape[axis] += missing
        view = jax.ShapeDtypeStruct(tuple(shape), self.view.dtype)
        padding = [(0, missing if i == axis else 0) for i in range(len(shape))]
        return Fetched(view, self.dims, self.starts, self.by_lane), padding


def fetched(place: Place) -> Fetched:
    sizes, starts = sizes_of(place), place.starts or (0,) * len(place.dims)
    kept = [i for i, size in enumerate(sizes) if size > 1]
    lanes = place.array.shape[0] if place.by_lane else 1
    view = jax.ShapeDtypeStruct((lanes, *(sizes[i] for i in kept)), place.array.dtype)
    return Fetched(view, tuple(place.dims[i] for i in kept), tuple(starts[i] for i in kept), place.by_lane)


def sizes_of(place: Place) -> tuple[int, ...]:
    return tuple(place.array.shape[1:] if place.by_lane else place.array.shape)


def can_fetch(place: Place, last: Dim) -> bool:
    """Whether it is a whole array with rows and columns, of which the ones that `last` says lie together, and as many
    of them as TMA's steps to what lies beside them are long."""
    if place.cut is not None or place.slots is not None:
        return False
    own = fetched(place)
    whole = own.view.shape[-1] * own.view.dtype.itemsize % STEP_BYTES == 0
    return whole and len(own.view.shape) <= MOST and own.dims[-1:] == (last,) and {ROW, COLUMN} <= set(own.dims)


def to_the_end(place: Place, dim: Dim, count: int) -> bool:
    """Whether nothing lies in an array behind so many rows or columns, for which TMA gives zeros."""
    at = place.dims.index(dim)
    return (place.starts[at] if place.starts else 0) + count == sizes_of(place)[at]


def over_columns(place: Place) -> bool:
    """Whether it is a vector over columns, or a number."""
    return place.cut is None and place.slots is None and set(place.dims) <= {COLUMN, None}


def is_number(place: Place) -> bool:
    return over_columns(place) and COLUMN not in place.dims


def in_floats(place: Place, columns: int) -> Any:
    """A number [lanes or 1], or a vector [lanes or 1, columns] with anything beyond the columns that there are."""
    starts = place.starts or (0,) * len(place.dims)
    index = (slice(at, at + columns) if dim == COLUMN else at for dim, at in zip(place.dims, starts, strict=True))
    array = (place.array if place.by_lane else place.array[None])[:, *index].astype(jnp.float32)
    return array if is_number(place) else jnp.pad(array, ((0, 0), (0, columns - array.shape[1])))
