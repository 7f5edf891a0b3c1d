"""The machine that serves: banks, and executables that read them, on one JAX device.

What compiles runs on any thread; everything else changes what the next bundle reads, and runs on the driver's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np

from coalesce.bank import default_device
from coalesce.compile import default_costs, default_tuned
from coalesce.errors import DeviceError, OutOfDeviceMemory
from coalesce.runtime.host import Host
from coalesce.runtime.ticket import Ticket
from coalesce.scheduler import catalog
from coalesce.scheduler.catalog import Catalog, Entry
from coalesce.serving.executable import compile_executable, Executable, Lanes
from coalesce.serving.fit import Fit
from coalesce.serving.schema import Options, plan_schema, Schema
from coalesce.serving.store import free_bytes

ANNOTATION = "coalesce bundle"  # what a dispatch is called in a trace of jax.profiler

Key = tuple[tuple[Entry, ...], tuple[int, ...]]  # entries, and the capacity of each one's bank


@dataclass(eq=False)
class Loaded:
    """An executable that reads the banks as they are now."""

    executable: Executable
    hosts: tuple[Host, ...]
    offered: catalog.Executable | None = None  # once it was timed
    used: int = 0  # the number of its last run


class Bundle:
    """A bundle on its way."""

    def __init__(self, device: Any, executable: Executable, outputs: Any, entries: Sequence[Sequence[Ticket]]) -> None:
        self._device, self._executable, self._outputs, self._entries = device, executable, outputs, entries

    def wait(self) -> None:
        try:
            jax.block_until_ready(self._outputs)
        except Exception as e:
            raise_understood(e, self._device)

    def results(self) -> list[list[Any]]:
        """Copies: what one tenant holds keeps no other's results alive, and shows none."""
        fetched = self._executable.fetch(self._outputs)
        return [
            [ticket.form.result([np.array(x[i]) for x in own]) for i, ticket in enumerate(tickets)]
            for tickets, own in zip(self._entries, fetched, strict=True)
        ]


def raise_understood(error: Exception, device: Any) -> NoReturn:
    """Raises what a run raised, as one of ours where it is not the tenants' own fault."""
    if "RESOURCE_EXHAUSTED" in str(error):
        raise OutOfDeviceMemory(f"there is no memory on the device to run this: {error}") from error
    try:
        jax.block_until_ready(jax.device_put(np.zeros(1, np.int32), device))
    except Exception:
        raise DeviceError(f"{device} does not work any more: {error}. Restart the process") from error
    raise error


class Device:
    """`at` is the JAX device; the default one unless given."""

    def __init__(self, memory_limit: int | None = None, at: Any = None, number: int = 0) -> None:
        self.at = default_device() if at is None else at
        self.number = number  # among those of the runtime
        self._memory_limit = memory_limit
        with self.here():
            measured = default_tuned(None, None)
            self._options = Options(self.at.platform, default_costs(None, measured), tuned=measured)
        self.hosts: dict[Any, Host] = {}  # by the schema's key
        self._places: dict[int, tuple[Host, int]] = {}  # of each family its host, and which template it is there
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

    def plan(self, fit: Fit) -> Schema:
        return plan_schema(fit, self._options)

    def compile(self, entries: tuple[Entry, ...], capacities: tuple[int, ...]) -> Executable:
        return compile_executable([self._lanes(*both) for both in zip(entries, capacities, strict=True)])

    def _lanes(self, entry: Entry, capacity: int) -> Lanes:
        host, template = self._places[entry.family]
        return Lanes(host.schema, template, entry.width, capacity)

    def capacity_of(self, family: int) -> int:
        return self._places[family][0].store.capacity

    def entries_of(self, host: Host, alone: bool = True) -> list[tuple[Entry, ...]]:
        """What was made for it, `alone` or with others."""
        of_it = all if alone else any
        return [entries for entries in list(self._numbers) if of_it(e.family in host.families for e in entries)]

    def knows(self, entries: Sequence[Entry]) -> bool:
        """Whether the families are still here."""
        return all(entry.family in self._places for entry in entries)

    def check_room(self, what: str, needed: int) -> None:
        """Raises OutOfDeviceMemory."""
        free = free_bytes([host.store for host in self.hosts.values()], self._memory_limit)
        if free is not None and needed > free:
            raise OutOfDeviceMemory(
                f"{what} needs {needed:,} bytes on the device, and {max(0, free):,} are free; remove tenants, or raise "
                "Runtime(memory_limit=)"
            )

    @property
    def held_bytes(self) -> int:
        return sum(host.store.nbytes for host in list(self.hosts.values()))

    # Of the driver's thread

    def admit(self, host: Host) -> None:
        """A schema that is new here; its families have numbers of `next_families`."""
        self.hosts[host.schema.key] = host
        self._places.update((family, (host, template)) for template, family in enumerate(host.families))

    def dismiss(self, host: Host) -> Catalog:
        """Its bank and its executables go; its families' numbers are not used again."""
        self.hosts.pop(host.schema.key)
        for family in host.families:
            del self._places[family]
        for entries in self.entries_of(host, alone=False):
            self._loaded.pop(self._numbers.pop(entries), None)
        self._spare = {key: own for key, own in self._spare.items() if key[0] in self._numbers}
        return self.catalog

    def next_families(self, count: int) -> list[int]:
        return [next(self._families) for _ in range(count)]

    def launch(self, executable: int, entries: Sequence[Sequence[Ticket]]) -> Bundle:
        loaded = self._loaded[executable]
        loaded.used = next(self._runs)
        number = next(ticket.bundles[-1] for tickets in entries for ticket in tickets)
        with jax.profiler.TraceAnnotation(ANNOTATION, device=self.number, bundle=number):
            lanes = [[(t.resident.slot, t.form.ordered(t.inputs)) for t in tickets] for tickets in entries]
            arguments = loaded.executable.stage(lanes)
            return Bundle(self.at, loaded.executable, self._run(loaded, arguments), entries)

    def launch_blank(self, key: Key) -> Bundle:
        """A run of what reads slot 0 and zeros."""
        loaded = self._loaded[self._numbers[key[0]]]
        blanks = [[(0, [np.zeros(x.shape, x.dtype) for x in own.program.inputs])] for own in loaded.executable.lanes]
        return Bundle(self.at, loaded.executable, self._run(loaded, loaded.executable.stage(blanks)), [])

    def _run(self, loaded: Loaded, arguments: Any) -> Any:
        try:
            return loaded.executable.run([host.store.bank for host in loaded.hosts], arguments)
        except Exception as e:
            raise_understood(e, self.at)

    def release(self, tickets: Sequence[Ticket]) -> None:
        """Requests that end early hold nothing here."""

    def install(self, key: Key, executable: Executable) -> bool:
        """Whether it can run now; else it is kept until its bank has grown, or dropped if that is past."""
        entries, capacities = key
        if not self.knows(entries):
            return False
        hosts = tuple(self._places[entry.family][0] for entry in entries)
        now = tuple(host.store.capacity for host in hosts)
        if now != capacities:
            if all(has <= wants for has, wants in zip(now, capacities, strict=True)):
                self._spare[key] = executable
            return False
        self._loaded[self._number(entries)] = Loaded(executable, hosts)
        return True

    def _number(self, entries: tuple[Entry, ...]) -> int:
        if entries not in self._numbers:
            self._numbers[entries] = next(self._next)
        return self._numbers[entries]

    def offer(self, key: Key, l50_ns: int, l99_ns: int) -> Catalog:
        number = self._numbers[key[0]]
        self._loaded[number].offered = catalog.Executable(number, key[0], l50_ns, l99_ns)
        self._loaded[number].used = next(self._runs)
        return self.catalog

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
        return loaded.offered.entries, tuple(host.store.capacity for host in loaded.hosts)

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
            if old is None or host not in old.hosts:
                continue
            ready = self._spare.pop((entries, tuple(h.store.capacity for h in old.hosts)), None)
            if ready is None:
                del self._loaded[number]
            else:
                self._loaded[number] = Loaded(ready, old.hosts, old.offered)
        return self.catalog

    @property
    def catalog(self) -> Catalog:
        return Catalog(tuple(own.offered for own in self._loaded.values() if own.offered is not None))
