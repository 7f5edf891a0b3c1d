"""The machine that serves: banks, pools of what lies between segments, and executables that read them, on one JAX
device.

What compiles runs on any thread; everything else changes what the next bundle reads, and runs on the driver's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import jax

from coalesce.bank import default_device
from coalesce.capture.aside import aside_of
from coalesce.compile import default_costs, default_tuned
from coalesce.errors import CompileError
from coalesce.runtime.apart import Apart
from coalesce.runtime.bundle import Bundle, lanes_of, leave, restored
from coalesce.runtime.first_runs import run_first
from coalesce.runtime.host import Course, Host
from coalesce.runtime.loaded import Home, Loaded
from coalesce.runtime.making import Making
from coalesce.runtime.room import room_for
from coalesce.runtime.ticket import Ticket
from coalesce.scheduler import catalog
from coalesce.scheduler.catalog import Catalog, Entry
from coalesce.serving.captured import Capturing
from coalesce.serving.executable import Executable, Lanes
from coalesce.serving.fit import Fit, Template
from coalesce.serving.page_locked import can_leave
from coalesce.serving.schema import cut, Options, plan_schema, Schema
from coalesce.serving.segments import Segments

ANNOTATION = "coalesce bundle"  # what a dispatch is called in a trace of jax.profiler

Key = tuple[tuple[Entry, ...], tuple[int, ...]]  # entries, and the capacity of each one's bank


class Device:
    """`at` is the JAX device; the default one unless given. `same`: a program always has the same kernels."""

    def __init__(
        self,
        memory_limit: int | None = None,
        at: Any = None,
        number: int = 0,
        apart: Apart | None = None,
        same: bool = False,
    ) -> None:
        self.at = default_device() if at is None else at
        self.make = Making(self.at, apart, same)
        self.number = number  # among those of the runtime
        self._memory_limit, self._same = memory_limit, same
        with self.here():
            measured = default_tuned(None, None)
            left = self.copies and can_leave(self.at)
            self._capturing = Capturing(lambda number: None if same else aside_of(self.at, number))
            costs, captured = default_costs(None, measured), self._capturing.can
            self._options = Options(self.at.platform, costs, tuned=measured, left=left, captured=captured)
        self.hosts: dict[Any, Host] = {}  # by the schema's key
        self._homes: dict[int, Home] = {}  # of each family
        self._families = itertools.count()
        self._numbers: dict[tuple[Entry, ...], int] = {}  # what an executable is called in the catalog
        self._next = itertools.count()
        self._runs = itertools.count(1)
        self._loaded: dict[int, Loaded] = {}
        self._spare: dict[Key, Executable] = {}  # for banks that are to grow

    # Of any thread

    def here(self) -> AbstractContextManager[Any]:
        """What the calling thread computes and compiles meanwhile is for this device."""
        return jax.default_device(self.at)

    def plan(self, fit: Fit, segments: int | None, patience_us: float | None) -> Schema:
        return plan_schema(fit, self._options, segments, patience_us, self.make.call)

    def plan_as_it_is(self, fit: Fit) -> Schema:
        return plan_schema(fit, replace(self._options, as_it_is=True))

    def cut(self, template: Template, patience_us: float, slower: float) -> Segments:
        """A program in other segments than it was planned with; see `segment`."""
        given = template, self._options, None, patience_us, slower
        return self.make.call(cut, *given, known=(template, self._options))

    def compile(self, entries: tuple[Entry, ...], capacities: tuple[int, ...]) -> Executable:
        lanes = [self._lanes(*both) for both in zip(entries, capacities, strict=True)]
        made = self._capturing.made(lanes, self.make)
        if self.copies:
            run_first(Loaded(made, self._homes_of(entries)), capacities, self.at)
        return made

    def _lanes(self, entry: Entry, capacity: int) -> Lanes:
        host, course = self._homes[entry.family]
        slots = course.pool.slots if course.pool is not None else 0
        return Lanes(host.schema, course.segments, entry.width, capacity, entry.segment, slots)

    def _homes_of(self, entries: Sequence[Entry]) -> tuple[Home, ...]:
        return tuple(self._homes[entry.family] for entry in entries)

    def capacity_of(self, family: int) -> int:
        return self._homes[family].host.store.capacity

    def may_mix(self, entries: Sequence[Entry]) -> bool:
        """Whether one executable may run them: not two segments of one program, whose pool would have to be copied, nor
        what may raise or not end with one that has a pool, which would be lost; nor any where kernels stay the same."""
        if self._same or not self.knows(entries):
            return False
        courses = [self._homes[entry.family].course for entry in entries]
        if len({course.family for course in courses}) < len(courses) or not all(map(self.may_widen, entries)):
            return False
        return not (any(c.segments.stays_whole for c in courses) and any(c.pool is not None for c in courses))

    def may_widen(self, entry: Entry) -> bool:
        """Whether several lanes of it may run in one executable."""
        return self.knows([entry]) and not self._homes[entry.family].host.schema.options.as_it_is

    def number_of(self, entries: tuple[Entry, ...]) -> int:
        """Of an executable that is offered."""
        return self._numbers[entries]

    def entries_of(self, host: Host, alone: bool = True) -> list[tuple[Entry, ...]]:
        """What was made for it, `alone` or with others."""
        of_it = all if alone else any
        own = {family for family, home in list(self._homes.items()) if home.host is host}
        return [entries for entries in list(self._numbers) if of_it(e.family in own for e in entries)]

    def knows(self, entries: Sequence[Entry]) -> bool:
        """Whether the families are still here."""
        return all(entry.family in self._homes for entry in entries)

    def has(self, key: Key) -> bool:
        """Whether it can run: it was not dropped, and its bank has not grown without it."""
        return self._numbers.get(key[0]) in self._loaded

    def check_room(self, what: str, needed: int) -> None:
        """Raises OutOfDeviceMemory."""
        self.room_for([1], lambda _: needed, lambda _: what)

    def room_for(self, counts: Sequence[int], bytes_of: Callable[[int], int], what: Callable[[int], str]) -> int:
        """The first of some counts for which there is room; raises OutOfDeviceMemory."""
        return room_for(list(self.hosts.values()), self._memory_limit, counts, bytes_of, what)

    @property
    def copies(self) -> bool:
        """To a device with memory of its own."""
        return self.at.platform != "cpu"

    @property
    def held_bytes(self) -> int:
        return sum(host.nbytes for host in list(self.hosts.values()))

    # Of the driver's thread

    def admit(self, host: Host) -> None:
        """A schema that is new here; its families have numbers of `next_families`."""
        self.hosts[host.schema.key] = host
        self.open(host, host.courses)

    def open(self, host: Host, courses: Sequence[Course]) -> None:
        """Programs of it, under numbers of `next_families`."""
        self._homes.update((course.family, Home(host, course)) for course in courses)

    def dismiss(self, host: Host) -> Catalog:
        """Its bank and its executables go; its families' numbers are not used again."""
        self.hosts.pop(host.schema.key)
        self.make.serves = self.make.serves and bool(self.hosts)
        return self.shut([family for family, home in self._homes.items() if home.host is host])

    def shut(self, families: Sequence[int]) -> Catalog:
        """Nobody asks for them any more."""
        for family in families:
            del self._homes[family]
        for entries in list(self._numbers):
            if not self.knows(entries):
                self._loaded.pop(self._numbers.pop(entries), None)
        self._spare = {key: own for key, own in self._spare.items() if key[0] in self._numbers}
        return self.catalog

    def next_families(self, count: int) -> list[int]:
        return [next(self._families) for _ in range(count)]

    def launch(self, executable: int, entries: Sequence[Sequence[Ticket]]) -> Bundle:
        self.make.serves = True
        return self.try_out(executable, entries)

    def try_out(self, executable: int, entries: Sequence[Sequence[Ticket]]) -> Bundle:
        """For lanes that nobody has asked for."""
        loaded = self._loaded.get(executable)
        if loaded is None:
            raise CompileError("it was dropped before it could be tried out")
        loaded.used = next(self._runs)
        number = next(ticket.bundles[-1] for tickets in entries for ticket in tickets)
        with jax.profiler.TraceAnnotation(ANNOTATION, device=self.number, bundle=number):
            restored(loaded.pools)  # before lanes are asked whose values are lost
            each = zip(entries, loaded.executable.lanes, loaded.pools, strict=True)
            lanes = [lanes_of(*one) for one in each]
            return loaded.run(self.at, lanes, entries)

    def launch_blank(self, key: Key) -> Bundle:
        """A run for nothing."""
        loaded = self._loaded[self._numbers[key[0]]]
        restored(loaded.pools)
        return loaded.run(self.at, loaded.blanks(), [])

    def release(self, tickets: Sequence[Ticket]) -> None:
        leave(tickets)

    def install(self, key: Key, executable: Executable) -> bool:
        """Whether it can run now; else it is kept until its bank has grown, or dropped if that is past."""
        entries, capacities = key
        if not self.knows(entries):
            return False
        loaded = Loaded(executable, self._homes_of(entries))
        now = loaded.capacities
        if now != capacities:
            if all(has <= wants for has, wants in zip(now, capacities, strict=True)):
                self._spare[key] = executable
            return False
        if entries not in self._numbers:
            self._numbers[entries] = next(self._next)
        self._loaded[self._numbers[entries]] = loaded
        return True

    def offer(self, key: Key, l50_ns: int, l99_ns: int) -> Catalog:
        number = self._numbers[key[0]]
        self._loaded[number].offered = catalog.Executable(number, key[0], l50_ns, l99_ns)
        self._loaded[number].used = next(self._runs)
        return self.catalog

    def apart_ns(self, entries: Sequence[Entry]) -> int | None:
        """What several entries take one after another, as far as it is known."""
        found = [self._loaded.get(self._numbers.get((entry,), -1)) for entry in entries]
        times = [own.offered.l50_ns for own in found if own is not None and own.offered is not None]
        return sum(times) if len(entries) > 1 and len(times) == len(entries) else None

    def drop(self, key: Key) -> None:
        """An executable that was never offered."""
        self._loaded.pop(self._numbers[key[0]], None)

    def evict(self, most: int) -> list[Key]:
        """Drops what ran the longest ago until no more are offered; returns what they were."""
        evicted = []
        while len(self.catalog.executables) > most:
            loaded = [(own.used, number) for number, own in self._loaded.items() if own.offered is not None]
            key = next((key for _, number in sorted(loaded) if (key := self.withdraw(number))), None)
            if key is None:
                break
            evicted.append(key)
        return evicted

    def withdraw(self, number: int) -> Key | None:
        """Drops an executable, and says what it was; None if it stays, since its family could not be served without."""
        loaded = self._loaded.get(number)
        if loaded is None or loaded.offered is None or self._is_narrowest(loaded.offered):
            return None
        del self._loaded[number]
        return loaded.offered.entries, loaded.capacities

    def _is_narrowest(self, executable: catalog.Executable) -> bool:
        if len(executable.entries) != 1:
            return False
        family, segment, _ = executable.entries[0]
        return self.catalog.by_place[family, segment][0] == executable

    def grow(self, host: Host, capacity: int) -> Catalog:
        """Make room, and go on with the executables that were made for it; what has none is offered no more."""
        host.store.grow(capacity)
        for entries, number in self._numbers.items():
            old = self._loaded.get(number)
            if old is None or all(home.host is not host for home in old.homes):
                continue
            ready = self._spare.pop((entries, old.capacities), None)
            if ready is None:
                del self._loaded[number]
            else:
                self._loaded[number] = Loaded(ready, old.homes, old.offered)
        return self.catalog

    @property
    def catalog(self) -> Catalog:
        """Also of other threads, hence copies."""
        cut = {family: home.course for family, home in list(self._homes.items()) if home.course.pool is not None}
        return Catalog(
            tuple(own.offered for own in list(self._loaded.values()) if own.offered is not None),
            {family: len(course.segments) for family, course in cut.items()},
            {family: course.offered for family, course in cut.items()},
        )
