"""What could run: the executables that are ready on a device.

Entry         lanes of one family at one segment of its program
Executable    a compiled bundle of entries, and how long it took when it was warmed up
Catalog       all of them; it does not change, a new one takes its place
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Entry(NamedTuple):
    family: int
    segment: int  # of the family's program, from 0
    width: int  # lanes; fewer can be asked for, and the rest is padding


def text_of(entries: Sequence[Entry]) -> str:
    return " with ".join(f"family {e.family}{f' segment {e.segment}' if e.segment else ''} x{e.width}" for e in entries)


class Executable(NamedTuple):
    id: int
    entries: tuple[Entry, ...]  # one, or one of each of several families
    l50_ns: int  # of a run on the device, with all lanes
    l99_ns: int
    bytes: int = 0  # that a run needs on the device besides weights


@dataclass(frozen=True)
class Catalog:
    executables: tuple[Executable, ...] = ()
    segments: Mapping[int, int] | None = None  # family -> in how many segments its program is cut; 1 where it is absent
    slots: Mapping[int, int] | None = None  # family -> lanes that may have begun and not ended; any number if absent

    def segments_of(self, family: int) -> int:
        return (self.segments or {}).get(family, 1)

    @cached_property
    def by_id(self) -> Mapping[int, Executable]:
        return {e.id: e for e in self.executables}

    @cached_property
    def by_place(self) -> Mapping[tuple[int, int], tuple[Executable, ...]]:
        """(family, segment) -> what runs it and nothing else, ascending in width."""
        found: dict[tuple[int, int], list[Executable]] = {}
        for e in self.executables:
            if len(e.entries) == 1:
                found.setdefault(e.entries[0][:2], []).append(e)
        return {place: tuple(sorted(es, key=lambda e: e.entries[0].width)) for place, es in found.items()}

    @cached_property
    def mixed(self) -> tuple[Executable, ...]:
        """Those that run segments of several families."""
        return tuple(e for e in self.executables if len(e.entries) > 1)
