"""The requests that have not ended, on their way; commands that say what became of them are left in `out`.

What fails together is run again in halves, each by itself, until those that fail are alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from coalesce.scheduler.baselines.menu import Menu
from coalesce.scheduler.baselines.waiting import Lane, Waiting
from coalesce.scheduler.commands import Command, Reason, Reject
from coalesce.scheduler.costs import Place
from coalesce.scheduler.events import Cancelled, Closed, Event, Submitted, TenantAdded, TenantRemoved
from coalesce.scheduler.request import Request
from coalesce.scheduler.slots import Slots
from coalesce.scheduler.tenancy import Tenancy


class Bundle(NamedTuple):
    id: int
    executable: int
    place: Place
    lanes: list[Lane]
    l50_ns: int
    l99_ns: int


class Requests:
    def __init__(self, waiting: Waiting, menu: Menu) -> None:
        self.out: list[Command] = []
        self.slots = Slots()
        self._waiting, self._menu = waiting, menu
        self._tenancy = Tenancy()
        self._lanes: dict[int, Lane] = {}
        self._closed = False
        self._lots = 0
        self._handlers: dict[type, Callable[[Any, int], object]] = {
            Submitted: self._submit,
            Cancelled: self._cancel,
            TenantAdded: lambda event, now_ns: self._tenancy.add(event.tenant),
            TenantRemoved: self._remove_tenant,
            Closed: self._close,
        }

    def take_in(self, event: Event, now_ns: int) -> None:
        """Events that say nothing of requests or tenants change nothing."""
        handle = self._handlers.get(type(event))
        if handle is not None:
            handle(event, now_ns)

    def _submit(self, event: Submitted, now_ns: int) -> None:
        for request in event.requests:
            reason = self._take_on(request, now_ns)
            if reason is not None:
                self.out.append(Reject(request.id, reason))

    def _take_on(self, request: Request, now_ns: int) -> Reason | None:
        account = self._tenancy.get(request.tenant)
        if self._closed:
            return Reason.SHUTDOWN
        if account is None:
            return Reason.UNKNOWN_TENANT
        if account.leaving:
            return Reason.TENANT_CLOSED
        if request.deadline_ns <= now_ns:
            return Reason.EXPIRED
        if account.waiting >= account.tenant.quota:
            return Reason.QUEUE_FULL
        account.waiting += 1
        account.pending += 1
        lane = self._lanes[request.id] = Lane(request, account)
        self._waiting.put(lane, (request.family, 0))
        return None

    def _cancel(self, event: Cancelled, now_ns: int) -> None:
        lane = self._lanes.get(event.request)
        if lane is not None:
            self.stop(lane, Reason.CANCELLED)

    def _remove_tenant(self, event: TenantRemoved, now_ns: int) -> None:
        account = self._tenancy.get(event.name)
        if account is None:
            return
        if not event.drain:
            self._stop_all([lane for lane in self._lanes.values() if lane.account is account], Reason.TENANT_CLOSED)
        self._tenancy.leave(account)

    def _close(self, event: Closed, now_ns: int) -> None:
        self._closed = True
        if not event.drain:
            self._stop_all(list(self._lanes.values()), Reason.SHUTDOWN)

    def _stop_all(self, lanes: Iterable[Lane], reason: Reason) -> None:
        for lane in lanes:
            self.stop(lane, reason)

    def stop(self, lane: Lane, reason: Reason) -> None:
        """Ends what waits now, and what is on the device after its bundle."""
        if lane.queue is None:
            lane.ending = lane.ending or reason
            return
        self._waiting.take(lane)
        self._reject(lane, reason)

    def begin(self, lanes: Iterable[Lane]) -> None:
        """They are dispatched."""
        for lane in lanes:
            self._waiting.take(lane)
            if not lane.begun:
                lane.begun = True
                lane.account.waiting -= 1
                self.slots.take(lane.request.family)

    def complete(self, bundle: Bundle, failed: bool) -> None:
        family, segment = bundle.place
        last = segment + 1 == self._menu.catalog.segments_of(family)
        going = [lane for lane in bundle.lanes if lane.ending is None]
        for lane in bundle.lanes:
            if last and not failed:
                self._end(lane)
            elif lane.ending is not None:
                self._reject(lane, lane.ending)
        if failed:
            self._run_again(bundle, going)
        elif not last:
            for lane in going:
                self._waiting.put(lane, (family, segment + 1))

    def _run_again(self, bundle: Bundle, going: list[Lane]) -> None:
        if len(bundle.lanes) == 1:
            for lane in going:
                self._reject(lane, Reason.FAILED)
            return
        middle = (len(going) + 1) // 2
        for half in going[:middle], going[middle:]:
            self._lots += 1
            for lane in half:
                self._waiting.put(lane, bundle.place, self._lots)

    def _reject(self, lane: Lane, reason: Reason) -> None:
        self.out.append(Reject(lane.request.id, reason))
        self._end(lane)

    def _end(self, lane: Lane) -> None:
        account = lane.account
        account.pending -= 1
        if lane.begun:
            self.slots.release(lane.request.family)
        else:
            account.waiting -= 1
        del self._lanes[lane.request.id]
        self._tenancy.forget_if_done(account)
