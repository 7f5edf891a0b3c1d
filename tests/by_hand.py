"""A policy by hand: a test says what happens and when, and sees what the policy answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.commands import Command, Dispatch, Reason, Reject, WakeAt, Want
from coalesce.scheduler.events import (
    Cancelled,
    CatalogChanged,
    Completed,
    Event,
    Submitted,
    TenantAdded,
    Timer,
)
from coalesce.scheduler.policy import Policy
from coalesce.scheduler.request import Request, Tenant

MS = 1_000_000


def catalog_of(
    times_ms: Mapping[int, float], families: int = 1, segments: int = 1, slots: Mapping[int, int] | None = None
) -> Catalog:
    """The same widths, and times a segment, for each of them."""
    places = [(family, segment) for family in range(families) for segment in range(segments)]
    forms = [(Entry(*place, width), round(ms * MS)) for place in places for width, ms in times_ms.items()]
    executables = tuple(Executable(i, (entry,), ns, ns) for i, (entry, ns) in enumerate(forms))
    return Catalog(executables, dict.fromkeys(range(families), segments) if segments > 1 else None, slots)


class Hand:
    """Times are milliseconds; `ended` says of each request how: a reason, or None for a result."""

    def __init__(self, policy: Policy, catalog: Catalog, tenants: Sequence[Tenant]) -> None:
        self.policy, self.catalog, self.now_ns = policy, catalog, 0
        self.requests: list[Request] = []
        self.running: deque[Dispatch] = deque()
        self.dispatched: list[list[int]] = []
        self.ended: dict[int, Reason | None] = {}
        self.wants: list[Want] = []
        self.wake_ms: float | None = None
        self.tell(CatalogChanged(catalog))
        for tenant in tenants:
            self.tell(TenantAdded(tenant))

    def tell(self, event: Event, at_ms: float | None = None) -> Sequence[Command]:
        if at_ms is not None:
            assert round(at_ms * MS) >= self.now_ns, "time goes back"
            self.now_ns = round(at_ms * MS)
        self.wake_ms = None
        commands = self.policy.on_event(event, self.now_ns)
        for command in commands:
            self._note(command)
        return commands

    def _note(self, command: Command) -> None:
        if isinstance(command, Dispatch):
            entries = self.catalog.by_id[command.executable].entries
            assert len(entries) == len(command.lanes)
            for entry, lanes in zip(entries, command.lanes, strict=True):
                assert 0 < len(lanes) <= entry.width and not set(lanes) & set(self.ended)
            self.running.append(command)
            self.dispatched.append([i for lanes in command.lanes for i in lanes])
        elif isinstance(command, Reject):
            self._end(command.request, command.reason)
        elif isinstance(command, WakeAt):
            assert command.time_ns > self.now_ns, f"woken at {command.time_ns}, asked at {self.now_ns}"
            self.wake_ms = command.time_ns / MS
        elif isinstance(command, Want):
            self.wants.append(command)

    def _end(self, request: int, how: Reason | None) -> None:
        assert request not in self.ended, f"request {request} ends twice"
        self.ended[request] = how

    def submit(self, at_ms: float, *requests: tuple[str, float], family: int = 0, priority: int = 0) -> list[int]:
        """Each of a tenant, with its SLO in milliseconds; returns their ids."""
        now_ns, first = round(at_ms * MS), len(self.requests)
        made = [
            Request(first + i, tenant, family, now_ns, now_ns + round(slo_ms * MS), priority)
            for i, (tenant, slo_ms) in enumerate(requests)
        ]
        self.requests += made
        self.tell(Submitted(tuple(made)), at_ms)
        return [request.id for request in made]

    def cancel(self, request: int) -> None:
        self.tell(Cancelled(request))

    def wake(self) -> None:
        assert self.wake_ms is not None, "nobody asked for it"
        self.tell(Timer(), self.wake_ms)

    def complete(self, at_ms: float, took_ms: float | None = None, failed: bool = False) -> None:
        """The first bundle that is on the device; it began when it could, unless it is said how long it took."""
        dispatch = self.running.popleft()
        end_ns = round(at_ms * MS)
        start_ns = end_ns - (dispatch.l50_ns if took_ms is None else round(took_ms * MS))
        for entry, lanes in zip(self.catalog.by_id[dispatch.executable].entries, dispatch.lanes, strict=True):
            if not failed and entry.segment + 1 == self.catalog.segments_of(entry.family):
                for request in lanes:
                    self._end(request, None)
        self.tell(Completed(dispatch.bundle, start_ns, end_ns, failed), at_ms)

    def finish(self, step_ms: float = 1.0) -> None:
        """Until nothing runs."""
        while self.running:
            self.complete(self.now_ns / MS + step_ms)
