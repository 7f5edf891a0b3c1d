"""The thread that makes executables, so that no request waits for a compiler.

    order -> compile here -> install on the driver's thread -> probe: a run for nothing, and PROBES timed ones -> offer

An executable is offered to the policy when it has run: how long it takes is known then, and its first run, which is
slower, is behind it. What fails is remembered with its error, and not tried again.

Tracing holds the interpreter's lock for milliseconds at a time, and whoever serves would wait for it. While it
compiles, threads therefore hand the lock on after YIELD_S instead of Python's 5 ms: a setting of the whole process.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from queue import PriorityQueue
from typing import Any, NamedTuple

from coalesce.errors import CoalesceError, CompileError, Shutdown
from coalesce.runtime.device import Device
from coalesce.runtime.driver import Driver, Order
from coalesce.runtime.finisher import Probe
from coalesce.scheduler.catalog import Entry, text_of
from coalesce.scheduler.commands import Want
from coalesce.scheduler.events import CatalogChanged, Event

LOG = logging.getLogger("coalesce.runtime")

PROBES = 7
YIELD_S = 2e-4
MIXED = 16  # executables of several families, at most

Key = tuple[tuple[Entry, ...], tuple[int, ...]]  # entries, and the capacity of each one's bank


class Job(NamedTuple):
    rank: int  # what a tenant waits for first, then the narrower
    number: int
    key: Key


class Foundry:
    def __init__(self, device: Device, widths: Iterable[int]) -> None:
        self._device, self._widths = device, frozenset(widths)
        self._jobs: PriorityQueue[Job] = PriorityQueue()
        self._made: dict[Key, Future[None]] = {}  # everything that was ever ordered
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="coalesce-foundry", daemon=True)

    def start(self, driver: Driver) -> None:
        self._driver = driver
        self._thread.start()

    def stop(self) -> None:
        """What is being compiled is finished, and nobody waits for it."""
        with self._lock:
            self._stopped = True
            waiting = [key for key, made in self._made.items() if not made.done()]
        for key in waiting:
            self._finish(key, Shutdown("the runtime was closed"))
        self._jobs.put(Job(-1, next(self._numbers), ((), ())))

    def want(self, want: Want) -> None:
        """The policy's wish, where it is one of a width that is offered; called on the driver's thread."""
        if any(entry.width not in self._widths for entry in want.entries):
            return
        mixed = {entries for entries, _ in self._made if len(entries) > 1}
        if len(want.entries) > 1 and (len(mixed) >= MIXED or not self._device.may_mix(want.entries)):
            return
        self.order(want.entries)

    def order(
        self, entries: tuple[Entry, ...], capacities: tuple[int, ...] | None = None, urgent: bool = False
    ) -> Future[None]:
        """Ends when the executable is offered, or with CompileError; for banks as large as they are unless said."""
        key = (entries, capacities or tuple(self._device.capacity_of(entry.family) for entry in entries))
        with self._lock:
            known = self._made.get(key)
            if known is not None:
                return known
            made = self._made[key] = Future()
            if self._stopped:
                made.set_exception(Shutdown("the runtime was closed"))
                return made
            rank = 0 if urgent else sum(entry.width for entry in entries) + 1000 * (len(entries) - 1)
            self._jobs.put(Job(rank, next(self._numbers), key))
        return made

    def forget(self, families: Sequence[int]) -> None:
        """They are gone, and their numbers with them."""
        with self._lock:
            self._made = {
                key: made for key, made in self._made.items() if all(e.family not in families for e in key[0])
            }

    def wait_idle(self, timeout: float | None) -> None:
        with self._idle:
            if not self._idle.wait_for(lambda: all(made.done() for made in self._made.values()), timeout):
                pending = sum(not made.done() for made in self._made.values())
                raise TimeoutError(f"{pending} executables are not ready after {timeout} s")

    def counts(self) -> tuple[int, int, dict[str, str]]:
        """(ready, on their way, what failed and why)."""
        with self._lock:
            done = {key: made for key, made in self._made.items() if made.done()}
            failed = {text_of(key[0]): str(made.exception()) for key, made in done.items() if made.exception()}
            return len(done) - len(failed), len(self._made) - len(done), failed

    def _loop(self) -> None:
        while self._work():
            continue

    def _work(self) -> bool:
        """Whether there is more to come."""
        job, usual = self._jobs.get(), sys.getswitchinterval()
        if self._stopped:
            return False
        sys.setswitchinterval(min(usual, YIELD_S))
        try:
            self._make(job.key)
        finally:
            sys.setswitchinterval(usual)
        made = self._made.get(job.key)
        if made is not None:
            wait([made])  # until it was probed: a compiler beside it would make it look slow
        return True

    def _make(self, key: Key) -> None:
        try:
            compiled = self._device.compile(*key)
        except Exception as e:
            self._fail(key, e)
            return
        self._driver.inbox.put(Order(lambda: self._install(key, compiled)))

    def _install(self, key: Key, compiled: Any) -> Sequence[Event]:
        """On the driver's thread."""
        if self._device.install(key, compiled):
            self._probe(key, [])
        else:  # its bank has grown meanwhile, or is for capacities to come
            self._finish(key)
        return ()

    def _probe(self, key: Key, times_ns: list[int]) -> None:
        def timed(outcome: int | Exception) -> None:
            if isinstance(outcome, Exception):
                self._fail(key, outcome)
                return
            times_ns.append(outcome)
            self._driver.inbox.put(Order(lambda: self._again(key, times_ns)))

        self._driver.probe(Probe(lambda: self._device.launch_blank(key), timed))

    def _again(self, key: Key, times_ns: list[int]) -> Sequence[Event]:
        if not self._device.knows(key[0]):
            self._finish(key)
            return ()
        if len(times_ns) <= PROBES:
            self._probe(key, times_ns)
            return ()
        timed = sorted(times_ns[1:])  # what looks slow is never tried, what looks fast is soon known
        catalog = self._device.offer(key, timed[1], timed[-1])
        LOG.info("executable for %s is ready: %.3f ms", text_of(key[0]), timed[1] / 1e6)
        self._finish(key)
        return (CatalogChanged(catalog),)

    def _finish(self, key: Key, error: Exception | None = None) -> None:
        with self._idle:
            made = self._made.get(key)
            if made is not None and not made.done():
                made.set_exception(error) if error is not None else made.set_result(None)
            self._idle.notify_all()

    def _fail(self, key: Key, error: Exception) -> None:
        if not self._device.knows(key[0]):  # its tenants have gone meanwhile
            self._finish(key)
            return
        what = text_of(key[0])
        LOG.warning("no executable for %s: %s: %s", what, type(error).__name__, error)
        raised = error if isinstance(error, CoalesceError) else CompileError(f"{what}: {type(error).__name__}: {error}")
        self._finish(key, raised)
