"""The thread that decides and dispatches: it tells the policy what happened and does what the policy answers.

Nothing else calls the policy or touches the machine. What others want done there (a tenant's weights written, an
executable added) comes through the inbox as an `Order` and is done between dispatches. The device works on while this
thread decides: bundles are dispatched without waiting for them, and the `Finisher` waits.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from coalesce.errors import DeviceError, ServingError, Shutdown
from coalesce.runtime.endings import error_of
from coalesce.runtime.finisher import Finisher, Flight, Probe, Probing
from coalesce.runtime.inbox import Inbox
from coalesce.runtime.machine import Machine
from coalesce.runtime.observer import Observers
from coalesce.runtime.ticket import Ending, Reply, tell, Ticket
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.commands import Dispatch, Quarantine, Readmit, Reject, WakeAt, Want
from coalesce.scheduler.events import CatalogChanged, Completed, Event, Submitted, Timer
from coalesce.scheduler.policy import Policy
from coalesce.scheduler.request import Request

LOG = logging.getLogger("coalesce.runtime")


class Order(NamedTuple):
    """Something to do on this thread, between dispatches; events that follow from it are told to the policy."""

    do: Callable[[], Sequence[Event]]


class Stop(NamedTuple):
    pass


class Driver:
    """`tickets` are the requests that have not ended, by id; a caller adds one before it sends the request here."""

    def __init__(
        self,
        policy: Policy,
        machine: Machine,
        observers: Observers,
        clock: Callable[[], int],
        want: Callable[[Want], None],
        hang_s: float,
    ) -> None:
        self.inbox = Inbox()
        self.tickets: dict[int, Ticket] = {}
        self.failure: ServingError | None = None  # of the device, for good
        self.stopped = False  # from then on nobody looks at the inbox
        self._policy, self._machine, self._observers, self._clock, self._want = policy, machine, observers, clock, want
        self._finisher = Finisher(self.inbox, machine, observers, clock, self.forget)
        self._hang_ns = int(hang_s * 1e9)
        self._forms: dict[int, Sequence[Entry]] = {}  # of the executables that are offered
        self._flights: deque[tuple[int, int]] = deque()  # (bundle, when it is overdue)
        self._wake_ns: int | None = None
        self._ended = threading.Condition()
        self._waiting = 0  # threads, for requests to end
        self._thread = threading.Thread(target=self._loop, name="coalesce-driver", daemon=True)
        self._does: dict[type, Callable[[Any, int], None]] = {
            Dispatch: self._dispatch,
            Reject: self._reject,
            WakeAt: self._wake_at,
            Want: lambda command, now_ns: self._want(command),
            Quarantine: self._report,
            Readmit: self._report,
        }

    def start(self) -> None:
        self._finisher.start()
        self._thread.start()

    def stop(self) -> None:
        """Ends both threads; what is in flight is not waited for if the device is lost."""
        self.inbox.put(Stop())
        self._thread.join()
        self._finisher.stop(wait=self.failure is None)
        self.stopped = True
        self._end_all(self.failure or Shutdown("the runtime is closed"))
        LOG.info("the runtime is closed")

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        return self._thread, self._finisher.thread

    def wait_for(self, gone: Callable[[Sequence[Ticket]], bool], timeout_s: float | None) -> bool:
        """Whether `gone` holds for the requests that have not ended, after at most so long."""
        with self._ended:
            self._waiting += 1
            try:
                return self._ended.wait_for(lambda: gone(list(self.tickets.values())), timeout_s)
            finally:
                self._waiting -= 1

    def wait_empty(self, timeout_s: float | None) -> bool:
        return self.wait_for(lambda tickets: not tickets, timeout_s)

    def forget(self, ids: Sequence[int]) -> None:
        """Requests have ended."""
        for i in ids:
            self.tickets.pop(i, None)
        with self._ended:
            if self._waiting:
                self._ended.notify_all()

    def send(self, ticket: Ticket) -> None:
        """Take on a request; called on any thread."""
        self._observers.sent(ticket)
        self.tickets[ticket.request.id] = ticket
        self.inbox.put(ticket.request)
        if self.stopped:  # it may have come after the last look at the inbox
            self._end_all(self.failure or Shutdown("the runtime is closed"))

    def order(self, order: Order, done: Future[Any]) -> None:
        """Have something done on this thread, which ends `done`; called on any other."""
        self.inbox.put(order)
        if self.stopped and not done.done():
            done.set_exception(Shutdown("the runtime is closed"))

    def probe(self, probe: Probe) -> None:
        """Run something for nothing; called on this thread."""
        begun_ns = self._clock()
        try:
            launched = probe.launch()
        except Exception as e:
            probe.done(e)
            return
        self._finisher.inbox.put(Probing(probe, launched, begun_ns))

    # The loop

    def _loop(self) -> None:
        while self._work():
            continue

    def _work(self) -> bool:
        """Whether there is more to come; nothing of what was done is held while this thread waits."""
        items = self.inbox.take(self._patience_s())
        if any(isinstance(item, Stop) for item in items):
            return False
        try:
            self._handle(items or [Timer()])
        except Exception:  # a bug of ours must not leave everybody waiting for ever
            LOG.exception("the driver failed; every request that waits ends with DeviceError")
            self._lose("the runtime's driver failed; its log has the traceback. Restart the runtime")
        if self._flights and self._clock() > self._flights[0][1]:
            self._lose(f"a bundle is on the device for {self._hang_ns / 1e9:g} s; it hangs. Restart the process")
        return True

    def _patience_s(self) -> float | None:
        times = [t for t in (self._wake_ns, self._flights[0][1] if self._flights else None) if t is not None]
        return max(0, min(times) - self._clock()) / 1e9 if times else None

    def _handle(self, items: Sequence[Any]) -> None:
        arrived: list[Request] = []
        for item in items:
            if isinstance(item, Request):
                arrived.append(item)
                continue
            self._tell_arrived(arrived)
            if isinstance(item, Order):
                for event in item.do():
                    self._tell(event)
            else:
                self._tell(item)
        self._tell_arrived(arrived)

    def _tell_arrived(self, arrived: list[Request]) -> None:
        if arrived:
            self._tell(Submitted(tuple(arrived)))
            arrived.clear()

    def _tell(self, event: Event) -> None:
        now_ns = self._clock()
        if isinstance(event, Completed):
            self._flights.popleft()
        elif isinstance(event, CatalogChanged):
            self._forms = {e.id: e.entries for e in event.catalog.executables}
        if self.failure is not None:
            self._end_all(self.failure)
            return
        self._wake_ns = None
        commands = self._policy.on_event(event, now_ns)
        self._observers.decided(event, now_ns, commands)
        for command in commands:
            self._does[type(command)](command, now_ns)

    # Commands

    def _dispatch(self, command: Dispatch, now_ns: int) -> None:
        entries = [[self.tickets[i] for i in lanes] for lanes in command.lanes]
        for tickets in entries:
            for ticket in tickets:
                if not ticket.bundles and isinstance(ticket.waiter, Reply):
                    ticket.waiter.set_running_or_notify_cancel()
                ticket.bundles.append(command.bundle)
        try:
            launched = self._machine.launch(command.executable, entries)
        except Exception as e:
            launched = e
        self._flights.append((command.bundle, self._clock() + self._hang_ns))
        self._finisher.inbox.put(Flight(command, self._forms[command.executable], entries, launched, now_ns))

    def _reject(self, command: Reject, now_ns: int) -> None:
        ticket = self.tickets.get(command.request)
        if ticket is None:
            return
        self._machine.release([ticket])
        self._observers.rejected(ticket, command.reason, now_ns)
        tell([Ending(ticket, None, error_of(ticket, command.reason, now_ns))])
        self.forget([command.request])

    def _wake_at(self, command: WakeAt, now_ns: int) -> None:
        self._wake_ns = command.time_ns

    def _report(self, command: Quarantine | Readmit, now_ns: int) -> None:
        name = command.tenant
        if isinstance(command, Quarantine):
            LOG.warning("tenant %r runs alone for now: bundles with it took far longer than predicted", name)
        else:
            LOG.info("tenant %r shares bundles again, on probation", name)

    # The end of all

    def _lose(self, why: str) -> None:
        """The device is gone: nothing will be dispatched any more."""
        if self.failure is None:
            LOG.error(why)
            self.failure = DeviceError(why)
        self._flights.clear()
        self._wake_ns = None
        self._end_all(self.failure)

    def _end_all(self, error: ServingError) -> None:
        tickets = list(self.tickets.values())
        tell([Ending(ticket, None, error) for ticket in tickets])
        self.forget([ticket.request.id for ticket in tickets])
