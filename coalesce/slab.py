"""Many arrays of weights as one argument of the program: every argument costs about a microsecond a call.

Slab    where arrays of one dtype, whose rows belong to the same tenants, lie side by side
Cut     one of these arrays, as a kernel gets it: the slab, and where in its rows to read
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
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


def whole(x: Any) -> Any:
    """An array as it is, a cut by itself."""
    return x.read() if isinstance(x, Cut) else x
