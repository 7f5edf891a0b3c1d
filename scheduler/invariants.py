"""What is always true of a policy, checked over its decisions: of a simulation, or of the real driver's log.

checker = Checker()
simulate(..., watchers=[checker.see])       # or an observer's `decided`, or every decision of a log
assert checker.finish() == []

ends once         every request that was submitted ends exactly once, by a Reject or with its last segment
in order          a request runs its segments one after another, in executables of them, never in two bundles
one at a time     the device runs one bundle after another, and bundles end in the order of their dispatch
room              at most as many lanes as an executable is wide, and as a family has slots
in time           nothing that has expired is dispatched, or still waits, or is not woken up for
not withdrawn     nothing runs again that was cancelled, or whose tenant was removed
with reason       each Reject has a reason that holds
within quota      no tenant has more requests waiting than its quota when one is admitted
apart             a tenant in quarantine shares no bundle; who is put there is here, and who is let out was there
few reruns        a failed bundle of n lanes makes none of them run more than log2(n) times again, rounded up
never stuck       while something waits there is a bundle on the device, or a time to wake up at
never idle        the device is not idle for longer than `patience_ns` while something waits that could run
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.commands import Command, Dispatch, Quarantine, Readmit, Reason, Reject, WakeAt, Want
from coalesce.scheduler.events import (
    Cancelled,
    CatalogChanged,
    Closed,
    Completed,
    Event,
    Submitted,
    TenantAdded,
    TenantRemoved,
    Timer,
)
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.run import Decision, Outcome
from coalesce.scheduler.standstill import Waiting, Way

SAYS = {Reason.CANCELLED: Outcome.CANCELLED, Reason.FAILED: Outcome.FAILED}


def check(log: Iterable[Decision], *, depth: int | None = None, patience_ns: int | None = None) -> list[str]:
    """What a log violates."""
    checker = Checker(depth=depth, patience_ns=patience_ns)
    for decision in log:
        checker.see(*decision)
    return checker.finish()


class Checker:
    """`depth`, the most bundles on the device or behind it, and `patience_ns` are not checked where they are None; a
    policy that `serves_late` need not drop what has expired."""

    def __init__(self, *, depth: int | None = None, patience_ns: int | None = None, serves_late: bool = False) -> None:
        self.violations: list[str] = []
        self.outcomes: Counter[Outcome] = Counter()
        self.submitted = 0
        self._depth, self._patience_ns, self._serves_late = depth, patience_ns, serves_late
        self._now_ns = 0
        self._new: frozenset[int] = frozenset()  # requests of the event that is looked at
        self._bundles = 0
        self._ways: dict[int, Way] = {}
        self._waiting = Waiting()
        self._flying: deque[tuple[Dispatch, int]] = deque()  # and when it was dispatched
        self._free_ns = 0
        self._catalog = Catalog()
        self._tenants: dict[str, Tenant] = {}
        self._closed = False
        self._quarantined: set[str] = set()
        self._wake_ns: int | None = None
        self._idle_ns: int | None = None  # since when the device is idle though something could run
        self._handlers: dict[type, Callable[[Any], None]] = {
            Submitted: self._submitted,
            Cancelled: self._cancelled,
            Completed: self._completed,
            TenantAdded: self._added,
            TenantRemoved: self._removed,
            CatalogChanged: self._changed,
            Closed: self._closes,
            Timer: lambda event: None,
            Dispatch: self._dispatch,
            Reject: self._reject,
            WakeAt: self._wake,
            Want: lambda command: None,
            Quarantine: self._quarantine,
            Readmit: self._readmit,
        }

    def see(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        self._expect(now_ns >= self._now_ns, f"time goes back from {self._now_ns}")
        self._now_ns = now_ns
        self._wake_ns = None
        self._handlers[type(event)](event)
        for command in commands:
            self._handlers[type(command)](command)
        self._settle(event)

    def finish(self) -> list[str]:
        """Everything that was violated; requests that have not ended count as pending."""
        self.outcomes[Outcome.PENDING] = len(self._ways)
        self._expect(self.outcomes.total() == self.submitted, f"{self.submitted} submitted, and {self.outcomes} ended")
        return self.violations

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.violations.append(f"at {self._now_ns}: {otherwise}")

    def _end(self, way: Way, outcome: Outcome) -> None:
        """It waits no more, or its last bundle is done."""
        del self._ways[way.request.id]
        self._waiting.end(way)
        self.outcomes[outcome] += 1

    # Events

    def _submitted(self, event: Submitted) -> None:
        self._new = frozenset(request.id for request in event.requests)
        for request in event.requests:
            self._expect(request.id not in self._ways, f"request {request.id} came twice")
            way = self._ways[request.id] = Way(request)
            self._waiting.add(way)
        self.submitted += len(event.requests)

    def _cancelled(self, event: Cancelled) -> None:
        way = self._ways.get(event.request)
        if way is not None:
            way.cancelled = True
            self._withdraw(way, Reason.CANCELLED)

    def _withdraw(self, way: Way | None, reason: Reason) -> None:
        if way is not None:
            way.withdrawn = way.withdrawn or reason

    def _completed(self, event: Completed) -> None:
        dispatch, begun_ns = self._flying.popleft()
        number = event.bundle
        self._expect(number == dispatch.bundle, f"bundle {number} ended before {dispatch.bundle}")
        self._expect(event.start_ns >= self._free_ns, f"bundle {number} began before the last one ended")
        self._expect(begun_ns <= event.start_ns <= event.end_ns <= self._now_ns, f"bundle {number} ran at {event}")
        self._free_ns = event.end_ns
        lanes = [self._ways[i] for own in dispatch.lanes for i in own]
        for way in lanes:
            way.bundle = None
            if event.failed:
                self._failed(way, len(lanes))
            else:
                way.again, way.segment = None, way.segment + 1
            if way.segment == self._catalog.segments_of(way.request.family):
                self._end(way, self._outcome(way, event.end_ns))
            else:
                self._waiting.add(way)

    def _failed(self, way: Way, lanes: int) -> None:
        may = (lanes - 1).bit_length()
        way.again = may if way.again is None else way.again - 1
        way.alone = lanes == 1
        self._expect(way.again >= 0, f"request {way.request.id} ran too often in bundles that failed")

    def _outcome(self, way: Way, end_ns: int) -> Outcome:
        if way.cancelled:
            return Outcome.CANCELLED
        return Outcome.OK if end_ns <= way.request.deadline_ns else Outcome.LATE

    def _added(self, event: TenantAdded) -> None:
        name = event.tenant.name
        if not self._is_here(name):
            self._quarantined.discard(name)  # nothing is held against another one of its name
        self._tenants[name] = event.tenant

    def _is_here(self, name: str) -> bool:
        return name in self._tenants or any(way.request.tenant == name for way in self._ways.values())

    def _removed(self, event: TenantRemoved) -> None:
        self._tenants.pop(event.name, None)
        if event.drain:
            return
        for way in self._ways.values():
            if way.request.tenant == event.name:
                self._withdraw(way, Reason.TENANT_CLOSED)

    def _changed(self, event: CatalogChanged) -> None:
        self._catalog = event.catalog

    def _closes(self, event: Closed) -> None:
        self._closed = True
        for way in () if event.drain else self._ways.values():
            self._withdraw(way, Reason.SHUTDOWN)

    # Commands

    def _dispatch(self, command: Dispatch) -> None:
        self._expect(command.bundle == self._bundles, f"bundle {command.bundle} came instead of {self._bundles}")
        self._bundles += 1
        self._flying.append((command, self._now_ns))
        depth = len(self._flying)
        self._expect(self._depth is None or depth <= self._depth, f"{depth} bundles are on the device")
        executable = self._catalog.by_id.get(command.executable)
        self._expect(executable is not None, f"bundle {command.bundle} is to run in what is not there")
        entries = executable.entries if executable is not None else ()
        self._expect(len(entries) == len(command.lanes), f"{command} has other entries than {entries}")
        for entry, own in zip(entries, command.lanes, strict=False):
            self._expect(len(own) <= entry.width, f"bundle {command.bundle} has {len(own)} lanes in {entry}")
            for i in own:
                self._fly(i, command.bundle, (entry.family, entry.segment))
        names = {self._ways[i].request.tenant for own in command.lanes for i in own if i in self._ways}
        self._expect(bool(names), f"bundle {command.bundle} is empty")
        alone = len(names) == 1 or not names & self._quarantined
        self._expect(alone, f"bundle {command.bundle} is of {names}, some in quarantine: {self._quarantined}")

    def _fly(self, number: int, bundle: int, place: tuple[int, int]) -> None:
        way = self._ways.get(number)
        if way is None:
            self._expect(False, f"bundle {bundle} holds request {number}, which has ended or never came")
            return
        request, here = way.request, (way.request.family, way.segment)
        self._expect(way.bundle is None, f"request {number} is in bundles {way.bundle} and {bundle}")
        self._expect(here == place, f"request {number} is at {here}, and runs at {place}")
        self._expect(
            self._serves_late or request.deadline_ns > self._now_ns, f"request {number} runs after its deadline"
        )
        self._expect(way.withdrawn is None, f"request {number} runs, though {way.withdrawn}")
        self._waiting.begin(way, bundle)
        held, slots = self._waiting.held[request.family], (self._catalog.slots or {}).get(request.family)
        self._expect(slots is None or held <= slots, f"{held} lanes of family {request.family} in {slots} slots")

    def _reject(self, command: Reject) -> None:
        way = self._ways.get(command.request)
        if way is None:
            self._expect(False, f"{command}, which has ended or never came")
            return
        self._expect(way.bundle is None, f"{command}, which is in bundle {way.bundle}")
        self._expect(self._holds(way, command.reason), f"{command}, without reason")
        self._end(way, SAYS.get(command.reason, Outcome.REFUSED if self._is_new(way) else Outcome.DROPPED))

    def _is_new(self, way: Way) -> bool:
        return way.request.id in self._new

    def _holds(self, way: Way, reason: Reason) -> bool:
        """Whether this is so, of what can be told from outside."""
        request = way.request
        if reason in (Reason.CANCELLED, Reason.TENANT_CLOSED, Reason.SHUTDOWN) and way.withdrawn is reason:
            return True
        if reason is Reason.SHUTDOWN:
            return self._closed
        if reason in (Reason.UNKNOWN_TENANT, Reason.TENANT_CLOSED):
            return self._is_new(way) and request.tenant not in self._tenants
        if reason is Reason.QUEUE_FULL:
            tenant = self._tenants.get(request.tenant)
            return self._is_new(way) and tenant is not None and self._waiting.of(request.tenant) > tenant.quota
        if reason is Reason.EXPIRED:
            return request.deadline_ns <= self._now_ns
        return way.alone if reason is Reason.FAILED else reason is Reason.INFEASIBLE

    def _wake(self, command: WakeAt) -> None:
        self._expect(command.time_ns > self._now_ns, f"wakes at {command.time_ns}")
        self._wake_ns = command.time_ns

    def _quarantine(self, command: Quarantine) -> None:
        name = command.tenant
        is_new = self._is_here(name) and name not in self._quarantined
        self._expect(is_new, f"{name!r} is put into quarantine, and is in it, or not here")
        self._quarantined.add(name)

    def _readmit(self, command: Readmit) -> None:
        name = command.tenant
        self._expect(name in self._quarantined, f"{name!r} is let out of quarantine, where it is not")
        self._quarantined.discard(name)

    # After both

    def _settle(self, event: Event) -> None:
        waiting, now_ns = self._waiting, self._now_ns
        if isinstance(event, Submitted):
            self._check_quotas({request.tenant for request in event.requests if request.id in self._ways})
        self._new = frozenset()
        deadline_ns = waiting.first_deadline()
        if deadline_ns is not None and not self._serves_late:
            self._expect(deadline_ns >= now_ns, f"a request waits whose deadline was {deadline_ns}")
            woken = self._wake_ns is not None and self._wake_ns <= max(now_ns, deadline_ns) + 1
            self._expect(woken, f"wakes at {self._wake_ns}, and a request waits that expires at {deadline_ns}")
        could_run = not self._flying and waiting.could_run(self._catalog)
        if not could_run:
            self._idle_ns = None
            return
        self._expect(self._wake_ns is not None, "the device is idle, something could run, and nothing is to happen")
        self._idle_ns = now_ns if self._idle_ns is None else self._idle_ns
        if self._patience_ns is not None and self._wake_ns is not None:
            until_ns = self._idle_ns + self._patience_ns
            self._expect(self._wake_ns <= until_ns, f"idle since {self._idle_ns}, and wakes at {self._wake_ns}")

    def _check_quotas(self, names: Iterable[str]) -> None:
        for name in names:
            tenant, waiting = self._tenants.get(name), self._waiting.of(name)
            self._expect(tenant is not None, f"a request was taken on of {name!r}, who is not here")
            self._expect(tenant is None or waiting <= tenant.quota, f"{waiting} requests of {name!r} wait, over quota")
