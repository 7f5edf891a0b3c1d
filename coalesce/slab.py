"""Many arrays of weights as one argument of the program: every argument costs about a microsecond a call.

Slab    where arrays of one dtype, whose rows belong to the same tenants, lie side by side
Cut     one of these arrays, as a kernel gets it: the slab, and where in its rows to read
Picked  the rows of an array, or of a cut, that a call reads: lanes come and go, and no weight moves
Turn    what one step of a loop reads of an array of all steps, where it lies
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Slab:
    """[rows, size]: row r holds row r of each of `arrays`, flat, from `starts[i]` on."""

    arrays: tuple[int, ...]
    starts: tuple[int, ...]
    size: int


@partial(jax.tree_util.register_dataclass, data_fields=["slab"], meta_fields=["start", "shape"])
@dataclass(frozen=True)
class Cut:
    """[rows, *shape], which lies in `slab` [rows, size] from `start` on."""

    slab: Any
    start: int
    shape: tuple[int, ...]

    def read(self) -> Any:
        """The array by itself: a copy, unless what reads it is fused with the slice."""
        rows = self.slab.shape[0]
        part = lax.slice_in_dim(self.slab, self.start, self.start + prod(self.shape), axis=1)
        return part.reshape(rows, *self.shape)


@partial(jax.tree_util.register_dataclass, data_fields=["array", "slots"], meta_fields=[])
@dataclass(frozen=True)
class Picked:
    """[L, ...]: row i is row slots[i] of `array`, which may be a cut. Every slot is a row of it."""

    array: Any
    slots: Any  # int32 [L]

    def read(self) -> Any:
        """The rows by themselves: a gather."""
        if isinstance(self.array, Cut):
            return gathered(self.array.slab, self.slots, self.array.start, self.array.shape)
        return self.array.at[self.slots].get(mode="promise_in_bounds")

    def step(self, at: Any) -> Any:
        """`read()[:, at]`, of which nothing else is read."""
        if isinstance(self.array, Cut):
            own = self.array.shape[1:]
            return gathered(self.array.slab, self.slots, self.array.start + at * prod(own), own)
        return self.array.at[self.slots, at].get(mode="promise_in_bounds")


@partial(jax.tree_util.register_dataclass, data_fields=["steps", "at"], meta_fields=["start"])
@dataclass(frozen=True)
class Turn:
    """[L, ...]: row i is steps[i, at], flat, from `start` on."""

    steps: Any  # [L, steps, ...]
    at: Any  # int32
    start: int = 0


def gathered(slab: Any, rows: Any, start: Any, shape: tuple[int, ...]) -> Any:
    """[L, *shape]: what lies in each of some rows of a slab from `start` on."""
    places = jnp.stack([rows, jnp.full_like(rows, start)], axis=1)
    along = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1))
    found = lax.gather(slab, places, along, (1, prod(shape)), mode="promise_in_bounds")
    return found.reshape(len(rows), *shape)


def whole(x: Any) -> Any:
    """An array as it is; a cut, or the rows that are picked, by themselves."""
    return x.read() if isinstance(x, Cut | Picked) else x
