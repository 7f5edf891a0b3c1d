"""Which registers of which pools an executable reads and writes, and how it does: reads first, then what is left.

What is only read stays as it is, so that a run that fails can be run again; what is written is donated, and changed in
place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from coalesce.serving.pool import Pool, pool_structs, read, write
from coalesce.serving.segments import Segments

At = tuple[int, int]  # an entry, and which register of its pool


@dataclass(frozen=True)
class States:
    """`segments[e]` is the program of entry e, of which it is the segment `at[e]`, with a pool of `slots[e]`."""

    segments: tuple[Segments, ...]
    at: tuple[int, ...]
    slots: tuple[int, ...]

    @cached_property
    def kept(self) -> list[At]:
        """What is read, which is never what is written."""
        return [(e, r) for e, own in enumerate(self.segments) for r in own.reads[self.at[e]]]

    @cached_property
    def written(self) -> list[At]:
        return [(e, r) for e, own in enumerate(self.segments) for r in own.writes[self.at[e]]]

    def structs(self, places: Sequence[At]) -> list[jax.ShapeDtypeStruct]:
        return [pool_structs(self.segments[e].registers, self.slots[e])[r] for e, r in places]

    def arrays(self, places: Sequence[At], pools: Sequence[Pool | None]) -> list[jax.Array]:
        return [of_entry(pools, e).registers[r] for e, r in places]

    def store(self, pools: Sequence[Pool | None], after: Sequence[jax.Array]) -> None:
        for (e, r), array in zip(self.written, after, strict=True):
            of_entry(pools, e).registers[r] = array

    def read(self, kept: Sequence[Any], slots: Sequence[Any]) -> list[list[Any]]:
        """Inside the program: for each entry what it reads, [width, ...]."""
        found: list[list[Any]] = [[] for _ in self.segments]
        for (e, r), register in zip(self.kept, kept, strict=True):
            found[e].append(read(register, slots[e], self.segments[e].registers[r]))
        return found

    def write(self, written: Sequence[Any], slots: Sequence[Any], outputs: Sequence[Sequence[Any]]) -> list[Any]:
        """Inside the program: the registers that are written, after the outputs of each entry were."""
        values = [x for e, own in enumerate(self.segments) if own.writes[self.at[e]] for x in outputs[e]]
        places = zip(self.written, written, values, strict=True)
        return [write(register, slots[e], x) for (e, _), register, x in places]


def of_entry(pools: Sequence[Pool | None], entry: int) -> Pool:
    pool = pools[entry]
    assert pool is not None, f"entry {entry} has no pool"
    return pool
