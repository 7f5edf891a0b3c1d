"""A schema on the device: the bank of its tenants' weights, and how its programs are run.

Course    one program, a family of the catalog: its segments, and the pool of what lies between them
Host      the bank, and the course of each of its programs
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coalesce.serving.pool import Pool
from coalesce.serving.schema import Schema
from coalesce.serving.segments import Segments
from coalesce.serving.store import Preparer, Store

FIRST_BYTES = 256 * 2**20  # a new bank has room for a few tenants, if they are small
FIRST_TENANTS = 16
LANES = 4  # that may be under way in a program, times the widest executable


@dataclass(frozen=True, eq=False)
class Course:
    family: int  # its number in the catalog
    segments: Segments
    pool: Pool | None  # None if there is one segment
    example: Sequence[Any]  # inputs as its family takes them

    @property
    def offered(self) -> int:
        """Places of the pool that requests may have; the rest is for what is tried out."""
        return self.pool.slots * LANES // (LANES + 1) if self.pool is not None else 0


def courses_of(
    families: Sequence[int], programs: Sequence[Segments], slots: int, examples: Sequence[Sequence[Any]]
) -> tuple[Course, ...]:
    """With pools for so many lanes each."""
    return tuple(
        Course(family, own, Pool(own.registers, slots) if len(own) > 1 else None, example)
        for family, own, example in zip(families, programs, examples, strict=True)
    )


def pool_bytes(programs: Sequence[Segments], slots: int) -> int:
    return sum(slots * own.lane_bytes for own in programs)


@dataclass(eq=False)
class Host:
    schema: Schema
    prepare: Preparer
    store: Store
    courses: tuple[Course, ...]  # of its templates
    residents: list[Any] = field(default_factory=list)  # that have a slot
    refused_us: float = 0.0  # the least that somebody could wait for, and no cut helped

    @property
    def tenants(self) -> int:
        return len(self.residents)

    @property
    def families(self) -> tuple[int, ...]:
        return tuple(course.family for course in self.courses)

    @property
    def reserve(self) -> int:
        """Slots that no tenant gets: lanes between segments go on with the weights that they began with, while others
        take their place."""
        return reserve(course.segments for course in self.courses)

    @property
    def nbytes(self) -> int:
        return self.store.nbytes + sum(course.pool.nbytes for course in self.courses if course.pool)

    def let_go(self) -> None:
        """Of what it has on the device."""
        self.store.let_go()
        for course in self.courses:
            if course.pool is not None:
                course.pool.let_go()

    def __str__(self) -> str:
        count = len(self.families)
        return f"family {self.families[0]}" if count == 1 else f"families {self.families[0]} to {self.families[-1]}"


def lanes_for(widths: Sequence[int]) -> int:
    """How many a pool has room for."""
    return (LANES + 1) * max(widths)


def reserve(programs: Iterable[Segments]) -> int:
    return int(any(len(own) > 1 for own in programs))


def first_capacities(schema: Schema) -> list[int]:
    """For a new bank; the first for which there is room."""
    most = max(1, min(FIRST_TENANTS, FIRST_BYTES // max(1, schema.slot_bytes)))
    return list(range(most, 0, -1))


def next_capacities(capacity: int) -> list[int]:
    """For a bank that is full; the first for which there is room."""
    return sorted({2 * capacity, capacity + capacity // 2, capacity + 1} - {capacity}, reverse=True)
