"""What a simulation consists of: what happens, what the policy is told of it, and what becomes of its answers.

Bundles run one after another on a device that takes what `takes` draws, and what is wanted is compiled for a while.
In which order things are told, and when, says `simulator`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappush
from random import Random
from typing import NamedTuple

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.commands import Dispatch, Reason, Reject, WakeAt, Want
from coalesce.scheduler.costs import FAR
from coalesce.scheduler.events import Cancelled, CatalogChanged, Completed, Event, Submitted, TenantAdded, Timer
from coalesce.scheduler.faults import Faults
from coalesce.scheduler.machine import Compiler, HostTimes, PROMPT, Takes
from coalesce.scheduler.policy import Policy
from coalesce.scheduler.request import Request
from coalesce.scheduler.run import Decision, Outcome, Run, Watcher
from coalesce.scheduler.tuples import made
from coalesce.scheduler.workloads import Arrival


class Made(NamedTuple):
    """What was wanted has been compiled."""

    entries: tuple[Entry, ...]


PENDING, OK, LATE, CANCELLED = Outcome.PENDING, Outcome.OK, Outcome.LATE, Outcome.CANCELLED
ENDS = {Reason.CANCELLED: Outcome.CANCELLED, Reason.FAILED: Outcome.FAILED}


class Simulation:
    def __init__(
        self,
        policy: Policy,
        run: Run,
        takes: Takes,
        host: HostTimes,
        faults: Faults | None,
        compiler: Compiler | None,
        seed: int,
        keep_log: bool,
        watchers: Sequence[Watcher],
    ) -> None:
        self._on_event = policy.on_event
        self.run, self._takes, self._host, self._faults, self._compiler = run, takes, host, faults, compiler
        self._rng = Random(seed)
        self._watchers = [*watchers, lambda *decision: run.log.append(Decision(*decision))] if keep_log else watchers
        self._rows, self._outcomes, self._ends_ns = run.rows, run.outcomes, run.ends_ns
        self.heap: list[tuple[int, int, Event | Made]] = []
        self._serial = 0  # of what is in it
        self._usual: dict[str, tuple[int, int]] = {}  # of tenants: what is allowed, and of which family a request is
        self._catalog = Catalog()
        self._executables: dict[int, Executable] = {}
        self._bundles: dict[int, Dispatch] = {}  # on the device or behind it
        self._withdrawn: set[int] = set()
        self._wanted: set[tuple[Entry, ...]] = set()
        self._compiled_ns = 0
        self.device_ns = 0  # when it is done with what it has
        self._told_ns = 0  # when the policy is told of the last bundle
        self._seen_ns = 0  # when anybody saw that it was done
        self._results_ns = 0  # what handing its results out took from then on
        self._handed: dict[int, int] = {}  # when clients have results of bundles, where somebody hands them out
        self.driver_ns = 0  # when it is done with what it was told
        self.wake_ns = FAR  # when the policy wants to be told the time

    def plan(self, happenings: Iterable[tuple[int, Event | Made]]) -> None:
        for time_ns, event in happenings:
            self._serial += 1
            heappush(self.heap, (time_ns, self._serial, event))

    def request(self, arrival: Arrival) -> Request:
        """It waits, for all that anybody knows."""
        time_ns, name, allowed_ns, priority, family = arrival
        rows, (slo_ns, first) = self._rows, self._usual[name]
        if allowed_ns is None:
            allowed_ns = slo_ns
        if family is None:
            family = first
        row = len(rows), name, family, time_ns, time_ns + allowed_ns, priority
        rows.append(row)
        self._outcomes.append(PENDING)
        self._ends_ns.append(0)
        return made(Request, row)

    def happen(self, happening: tuple[int, int, Event | Made], now_ns: int) -> None:
        time_ns, _, event = happening
        if isinstance(event, Completed):
            self._finish(event, time_ns)
        elif isinstance(event, Cancelled):
            if event.request < len(self._rows):
                self._withdrawn.add(event.request)
        elif isinstance(event, TenantAdded):
            self._usual[event.tenant.name] = event.tenant.slo_ns, event.tenant.families[0]
        elif isinstance(event, CatalogChanged):
            self._catalog = event.catalog
            self._executables.update(event.catalog.by_id)
        elif isinstance(event, Made):
            event = self._offer(event)
        self.tell(event, now_ns)

    def _finish(self, event: Completed, ended_ns: int) -> None:
        """Lanes that were at their last segment have ended."""
        dispatch = self._bundles.pop(event.bundle)
        ended_ns = self._handed.pop(event.bundle, ended_ns)
        run = self.run
        if event.failed:
            run.failures += 1
            return
        rows, outcomes, ends_ns, withdrawn = self._rows, self._outcomes, self._ends_ns, self._withdrawn
        for entry, lanes in zip(self._executables[dispatch.executable].entries, dispatch.lanes, strict=True):
            if entry.segment + 1 < self._catalog.segments_of(entry.family):
                continue
            for number in lanes:
                ends_ns[number] = ended_ns
                outcomes[number] = OK if ended_ns <= rows[number][4] else LATE
            for number in withdrawn.intersection(lanes) if withdrawn else ():
                outcomes[number] = CANCELLED

    def tell(self, event: Event, now_ns: int) -> None:
        commands = self._on_event(event, now_ns)
        if self._host is not PROMPT:
            self.driver_ns = now_ns + self._host.decide(event, commands)
        self.run.decisions += 1
        for watch in self._watchers:
            watch(event, now_ns, commands)
        wake_ns = FAR
        for command in commands:
            if isinstance(command, WakeAt):
                wake_ns = command.time_ns
                assert wake_ns > now_ns, f"asked at {now_ns} to be woken at {wake_ns}"
            elif isinstance(command, Reject):
                self._reject(command, event, now_ns)
            elif isinstance(command, Dispatch):
                self._dispatch(command, now_ns)
            elif isinstance(command, Want):
                self._want(command, now_ns)
        self.wake_ns = wake_ns

    def _dispatch(self, command: Dispatch, now_ns: int) -> None:
        executable = self._executables[command.executable]
        host, brought_ns, bring_ns = self._host, now_ns, 0
        if host is not PROMPT:
            brought_ns, bring_ns = now_ns + host.dispatch(), host.bring(command)
            if bring_ns:
                begun_ns = self.driver_ns
                brought_ns = self.driver_ns = begun_ns + bring_ns
        start_ns = max(self.device_ns, brought_ns)
        end_ns = start_ns + self._takes(executable, self._rng)
        failed = False
        if self._faults is not None:
            end_ns, failed = self._go_wrong(self._faults, command, start_ns, end_ns)
        run = self.run
        run.busy_ns += end_ns - start_ns
        run.bundles += 1
        run.lanes += sum(map(len, command.lanes))
        run.widths += sum(entry.width for entry in executable.entries)
        run.mixed += len(command.lanes) > 1
        self.device_ns = end_ns
        self._bundles[command.bundle] = command
        completed = Completed(command.bundle, start_ns, end_ns, failed, bring_ns)
        if bring_ns:
            completed = self._waited_for(command, completed, begun_ns)
        self._told_ns = max(self._told_ns, completed.end_ns + host.tell())
        self.plan([(self._told_ns, completed)])

    def _waited_for(self, command: Dispatch, completed: Completed, begun_ns: int) -> Completed:
        """As a thread sees it that hands out the results of one after another: it began when the one before it was
        done, or when it was decided."""
        seen_ns = self._seen_ns
        end_ns = max(completed.end_ns, seen_ns + self._results_ns)
        start_ns, brought_ns = max(seen_ns, begun_ns), begun_ns + completed.host_ns
        known = completed._replace(
            start_ns=start_ns, end_ns=end_ns, results_ns=self._results_ns, brought_ns=brought_ns
        )
        self._results_ns = 0 if completed.failed else self._host.hand_out(command)
        self._seen_ns, self._handed[command.bundle] = end_ns, end_ns + self._results_ns
        return known

    def _go_wrong(self, faults: Faults, command: Dispatch, start_ns: int, end_ns: int) -> tuple[int, bool]:
        """(when it ends, whether it fails)"""
        numbers = [number for lanes in command.lanes for number in lanes]
        names = {number: self._rows[number][1] for number in numbers}
        factor = faults.factor(frozenset(names.values()), start_ns)
        end_ns = faults.end(start_ns, start_ns + int((end_ns - start_ns) * factor))
        return end_ns, any(faults.fails(names[number], number, start_ns) for number in numbers)

    def _reject(self, command: Reject, event: Event, now_ns: int) -> None:
        run, number = self.run, command.request
        at_once = isinstance(event, Submitted) and event.requests[0].id <= number
        run.outcomes[number] = ENDS.get(command.reason, Outcome.REFUSED if at_once else Outcome.DROPPED)
        run.ends_ns[number] = now_ns
        run.reasons[number] = command.reason

    def _want(self, command: Want, now_ns: int) -> None:
        compiler = self._compiler
        if compiler is None or command.entries in self._wanted or len(self._wanted) >= compiler.most:
            return
        self._wanted.add(command.entries)
        self._compiled_ns = max(self._compiled_ns, now_ns) + compiler.takes_ns
        self.plan([(self._compiled_ns, Made(command.entries))])

    def _offer(self, event: Made) -> Event:
        assert self._compiler is not None, "nothing is made without a compiler"
        times = self._compiler.time(event.entries)
        if times is None:
            return Timer()
        made = Executable(max(self._executables, default=-1) + 1, event.entries, *times)
        self._executables[made.id] = made
        self._catalog = Catalog((*self._catalog.executables, made), self._catalog.segments, self._catalog.slots)
        return CatalogChanged(self._catalog)
