"""The threads that make executables, so that no request waits for a compiler.

    order -> compile here -> install on the driver's thread -> probe: a run for nothing, and PROBES timed ones -> offer

An executable is offered to the policy when it has run: how long it takes is known then, and its first run, which is
slower, is behind it. What fails is remembered with its error, and not tried again. One of several families that takes
no less than theirs one after another is not offered.

One is made at a time, so that compilers leave others the processor; but nobody waits longer than SLOW_S for a compiler
that works for somebody else, and one that is not done after `stall_s` is waited for no more. Of those that were offered
at most so many are kept: the one that ran the longest ago goes, unless its family could not be served without.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from heapq import heappop, heappush
from typing import Any, NamedTuple

from coalesce.errors import CoalesceError, CompileError, Shutdown
from coalesce.runtime.device import Device
from coalesce.runtime.driver import Driver
from coalesce.runtime.finisher import Probe
from coalesce.runtime.orders import Order
from coalesce.scheduler.catalog import Entry, text_of
from coalesce.scheduler.commands import Want
from coalesce.scheduler.events import CatalogChanged, Event

LOG = logging.getLogger("coalesce.runtime")

PROBES = 7
MIXED = 16  # executables of several families, at most
SLOW_S = 10.0
SIDE_BY_SIDE = 4  # compilers, at most, each but the last one slow
JOIN_S = 10.0

Key = tuple[tuple[Entry, ...], tuple[int, ...]]  # entries, and the capacity of each one's bank


class Job(NamedTuple):
    rank: int  # what a tenant waits for first, then the narrower
    number: int
    key: Key


class Foundry:
    """`around` gives a context in which programs are made."""

    def __init__(
        self, device: Device, widths: Iterable[int], most: int, stall_s: float, around: Callable[[], Any]
    ) -> None:
        self._device, self._widths, self._most, self._stall_s = device, frozenset(widths), most, stall_s
        self._around = around
        self._jobs: list[Job] = []  # a heap
        self._made: dict[Key, Future[None]] = {}  # everything that was ever ordered
        self._crowded: set[Key] = set()  # what was made in vain, and may be made again when others have gone
        self._running: dict[Key, float] = {}  # since when
        self._numbers = itertools.count()
        self._change = threading.Condition()
        self._over: Exception | None = None  # why nothing is made any more
        self._thread = threading.Thread(target=self._loop, name="coalesce-foundry", daemon=True)

    def start(self, driver: Driver) -> None:
        self._driver = driver
        self._thread.start()

    def stop(self) -> None:
        """What is being compiled is waited for, for a while: a process that ends in its middle may not end well."""
        self.give_up(Shutdown("the runtime was closed"))
        with self._change:
            self._change.wait_for(lambda: not self._running, JOIN_S)

    def give_up(self, why: Exception) -> None:
        """Nobody waits for what is ordered; called on any thread."""
        with self._change:
            self._over = self._over or why
            self._change.notify_all()  # also who starts what is ordered, where nothing is
            waiting = [key for key, made in self._made.items() if not made.done()]
        for key in waiting:
            self._finish(key, why)

    def want(self, want: Want) -> None:
        """The policy's wish, for one family in the next width that is offered; called on the driver's thread."""
        entries = want.entries
        if len(entries) == 1:
            wide = [width for width in self._widths if width >= entries[0].width]
            entries = tuple(entry._replace(width=min(wide)) for entry in entries if wide)
        if not entries or any(e.width not in self._widths or not self._device.may_widen(e) for e in entries):
            return
        mixed = {made for made, _ in list(self._made) if len(made) > 1}
        if len(entries) > 1 and (len(mixed) >= MIXED or not self._device.may_mix(entries)):
            return
        self.order(entries)

    def exhausted(self, executable: int, error: Exception) -> Sequence[Event]:
        """There was no memory to run it: it is offered no more, unless its family could not be served without."""
        key = self._device.withdraw(executable)
        if key is None:
            return ()
        LOG.warning("%s is not used any more: %s", text_of(key[0]), error)
        with self._change:
            self._made[key] = Future()
        self._finish(key, error)
        return [CatalogChanged(self._device.catalog)]

    def order(
        self, entries: tuple[Entry, ...], capacities: tuple[int, ...] | None = None, urgent: bool = False
    ) -> Future[None]:
        """Ends when the executable is offered, or with CompileError; for banks as large as they are unless said."""
        key = (entries, capacities or tuple(self._device.capacity_of(entry.family) for entry in entries))
        with self._change:
            known = self._made.get(key)
            if known is not None:
                return known
            made = self._made[key] = Future()
            if self._over is not None:
                made.set_exception(self._over)
                return made
            rank = 0 if urgent else sum(entry.width for entry in entries) + 1000 * (len(entries) - 1)
            heappush(self._jobs, Job(rank, next(self._numbers), key))
            self._change.notify_all()
        return made

    def forget(self, families: Sequence[int]) -> None:
        """They are gone, and their numbers with them."""
        with self._change:
            gone = [key for key in self._made if any(entry.family in families for entry in key[0])]
        for key in gone:
            self._finish(key, CompileError(f"{text_of(key[0])}: nobody is left who would run it"))
        with self._change:
            for key in {*gone, *self._crowded}:  # there may be room now
                self._made.pop(key, None)
            self._crowded.clear()

    def wait_idle(self, timeout: float | None) -> None:
        with self._change:
            if not self._change.wait_for(lambda: all(made.done() for made in self._made.values()), timeout):
                pending = sum(not made.done() for made in self._made.values())
                raise TimeoutError(f"{pending} executables are not ready after {timeout} s")

    def ordered(self) -> tuple[int, dict[str, str]]:
        """(on their way, what failed and why); what was given up was not tried. Whoever asks takes no lock of ours."""
        known = self._made.copy()
        ended = {key: made.exception() for key, made in known.items() if made.done()}
        failed = {key: error for key, error in ended.items() if error not in (None, self._over)}
        return len(known) - len(ended), {text_of(key[0]): str(error) for key, error in failed.items()}

    # Compilers

    def _loop(self) -> None:
        """Starts them, and sees who stalls."""
        while True:
            with self._change:
                patience_s = 1.0 if self._running else None
                self._change.wait_for(lambda: self._over is not None or self._may_start(), patience_s)
                if self._over is not None:
                    return
                key = heappop(self._jobs).key if self._may_start() else None
                if key is not None:
                    self._running[key] = time.monotonic()
                late = [k for k, since in self._running.items() if time.monotonic() - since > self._stall_s]
            if key is not None:
                threading.Thread(target=self._work, args=(key,), name="coalesce-compiler", daemon=True).start()
            for k in late:
                self._fail(k, TimeoutError(f"it was not compiled after {self._stall_s:g} s"))

    def _may_start(self) -> bool:
        ages = [time.monotonic() - since for since in self._running.values()]
        return bool(self._jobs) and len(ages) < SIDE_BY_SIDE and all(age > SLOW_S for age in ages)

    def _work(self, key: Key) -> None:
        made = self._made.get(key)
        if made is not None and not made.done():  # else its tenants have gone, or the runtime
            self._make(key)
            wait([made], self._stall_s)  # until it was probed: a compiler beside it would make it look slow
        with self._change:
            del self._running[key]
            self._change.notify_all()

    def _make(self, key: Key) -> None:
        try:
            with self._around(), self._device.here():
                compiled = self._device.compile(*key)
        except BaseException as e:
            self._fail(key, e)
            return
        self._driver.inbox.put(Order(lambda: self._install(key, compiled)))

    # On the driver's thread

    def _install(self, key: Key, compiled: Any) -> Sequence[Event]:
        made = self._made.get(key)
        if made is not None and made.done():  # it took too long
            return ()
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
        if not self._device.has(key):
            self._finish(key)
            return ()
        if len(times_ns) <= PROBES:
            self._probe(key, times_ns)
            return ()
        timed = sorted(times_ns[1:])  # what looks slow is never tried, what looks fast is soon known
        apart_ns = self._device.apart_ns(key[0])
        if apart_ns is not None and timed[1] >= apart_ns:
            both = f"{timed[1] / 1e6:.3f} ms, and {apart_ns / 1e6:.3f} ms one after another"
            LOG.info("%s takes %s: it is done without", text_of(key[0]), both)
            self._device.drop(key)
            self._finish(key)
            return ()
        self._device.offer(key, timed[1], timed[-1])
        evicted = self._device.evict(self._most)
        with self._change:
            for old in evicted:
                if old != key:
                    self._made.pop(old, None)
        if key in evicted:
            self._crowd_out(key)
        else:
            LOG.info("executable for %s is ready: %.3f ms", text_of(key[0]), timed[1] / 1e6)
            self._finish(key)
        return (CatalogChanged(self._device.catalog),)

    def _crowd_out(self, key: Key) -> None:
        """All others are the narrowest of their families, and stay."""
        with self._change:
            self._crowded.add(key)
        why = f"{self._most} executables are kept, and those that there are cannot go: see Runtime(executables=)"
        LOG.info("no executable for %s: %s", text_of(key[0]), why)
        self._finish(key, CompileError(f"{text_of(key[0])}: {why}"))

    # Of any thread

    def _finish(self, key: Key, error: BaseException | None = None) -> None:
        with self._change:
            made = self._made.get(key)
            if made is not None and not made.done():
                made.set_exception(error) if error is not None else made.set_result(None)
            self._change.notify_all()

    def _fail(self, key: Key, error: BaseException) -> None:
        made = self._made.get(key)
        if made is None or made.done() or not self._device.knows(key[0]):  # its tenants have gone meanwhile
            self._finish(key)
            return
        if isinstance(error, Shutdown):  # the compiler's process ends before the rest
            self.give_up(error)
            return
        what = text_of(key[0])
        LOG.warning("no executable for %s: %s: %s", what, type(error).__name__, error)
        raised = error if isinstance(error, CoalesceError) else CompileError(f"{what}: {type(error).__name__}: {error}")
        self._finish(key, raised)
