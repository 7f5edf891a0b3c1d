"""The thread that decides and dispatches: it tells the policy what happened and does what the policy answers.

Nothing else calls the policy or touches the machine. What others want done there (a tenant's weights written, an
executable added) comes through the inbox as an `Order` and is done between dispatches. The device works on while this
thread decides: bundles are dispatched without waiting for them (`Launcher`), and the `Finisher` waits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coalesce.errors import DeviceError, PolicyError, ServingError, Shutdown
from coalesce.runtime.book import Book
from coalesce.runtime.callbacks import Callbacks
from coalesce.runtime.elsewhere import Elsewhere
from coalesce.runtime.endings import error_of
from coalesce.runtime.finisher import Exhausted, Finisher, Lost, Probe, Probing
from coalesce.runtime.gil import handing_on
from coalesce.runtime.inbox import Inbox, Look
from coalesce.runtime.launcher import Launcher, Leaving
from coalesce.runtime.machine import Machine, Maker
from coalesce.runtime.observer import Observers
from coalesce.runtime.orders import Order, Orders, Stop
from coalesce.runtime.reports import report
from coalesce.runtime.terms import left_s
from coalesce.runtime.ticket import Ending, tell, Ticket
from coalesce.runtime.watchdog import Watchdog
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.commands import Command, Dispatch, Quarantine, Readmit, Reason, Reject, WakeAt, Want
from coalesce.scheduler.events import Cancelled, CatalogChanged, Completed, Event, Submitted, Timer
from coalesce.scheduler.policy import Policy
from coalesce.scheduler.request import Request

LOG = logging.getLogger("coalesce.runtime")


JOIN_S = 1.0  # how long a thread is waited for that may hang


class Driver:
    def __init__(
        self,
        policy: Policy,
        machine: Machine,
        observers: Observers,
        clock: Callable[[], int],
        maker: Maker,
        hang_s: float,
    ) -> None:
        self.inbox = Inbox()
        self.book = Book(observers, clock)
        self.failure: ServingError | None = None  # of the device, for good
        self.stopped = False  # from then on nobody looks at the inbox
        self._policy, self._machine, self._maker, self._observers = policy, machine, maker, observers
        self._elsewhere = policy if isinstance(policy, Elsewhere) else None
        self._clock = clock
        self.callbacks = Callbacks(clock)
        self._finisher = Finisher(self.inbox, observers, clock, self.book, self.callbacks.late_ns)
        # whoever ends a request may be about to end one that a callback waits for
        self.call_back, self.call_all_back = self.callbacks.call, self.callbacks.call_all
        self._watchdog = Watchdog(self._overdue, self.lose, hang_s)
        self._hang_ns = int(hang_s * 1e9)
        self._launcher = Launcher(machine, self._finisher, clock, self._hang_ns, self._elsewhere is not None)
        self._busy_since_ns: int | None = None  # with what it took from the inbox
        self._asked_ns: int | None = None  # the policy, which has not answered yet
        self._forms: dict[int, Sequence[Entry]] = {}  # of the executables that are offered
        self._wake_ns: int | None = None
        self._orders = Orders()
        self._losing = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="coalesce-driver", daemon=True)
        self._does: dict[type, Callable[[Any, int], None]] = {
            Dispatch: self._dispatch,
            WakeAt: self._wake_at,
            Want: lambda command, now_ns: self._maker.want(command),
            Quarantine: report,
            Readmit: report,
        }

    def start(self) -> None:
        self.callbacks.start()
        self._finisher.start()
        self._launcher.start()
        self._watchdog.start()
        self._thread.start()

    def stop(self, called_until: Callable[[], float | None] = lambda: None) -> None:
        """Ends the threads, after everything that was put into the inbox; a device that is lost is not waited for, nor
        are callbacks longer than that, and JOIN_S."""
        self.inbox.put(Stop())
        self._join(self._thread)
        self._launcher.stop()
        self._join(self._launcher.thread)
        self._finisher.stop()
        self._join(self._finisher.thread)
        self._watchdog.stop()
        self._watchdog.thread.join(JOIN_S)
        self.stopped = True
        self._orders.fail_all(self.last_error)
        self.book.end_all(self.last_error, Reason.SHUTDOWN)
        self.book.wait_empty(JOIN_S)  # whoever sends too late may be ending what was sent
        self.callbacks.stop()
        self._join(self.callbacks.thread, called_until)  # the last: they may wait for what has ended just now
        if self.callbacks.thread.is_alive():
            LOG.warning("a callback of a request has not returned: the runtime is closed, and it goes on by itself")
        LOG.info("the runtime is closed")

    def _join(self, thread: threading.Thread, until: Callable[[], float | None] = lambda: None) -> None:
        while thread.is_alive():
            thread.join(JOIN_S)
            if self.failure is not None or left_s(until()) == 0:
                return

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        own = self._launcher, self._finisher, self._watchdog, self.callbacks
        return self._thread, *(each.thread for each in own)

    @property
    def last_error(self) -> ServingError:
        """Why nothing is done any more."""
        return self.failure or Shutdown("the runtime is closed")

    def send(self, ticket: Ticket) -> None:
        """Take on a request; called on any thread."""
        if self._observers.hear_sent:
            self._observers.sent(ticket)
        self.book.tickets[ticket.request.id] = ticket
        self.inbox.put(ticket.request)
        if self.stopped:  # it may have come after the last look at the inbox
            self.book.end_all(self.last_error, Reason.SHUTDOWN)

    def withdraw(self, request: int) -> None:
        """Nobody waits for a request any more."""
        self.inbox.put(Cancelled(request))

    def carry_out(self, do: Callable[[], Sequence[Event]]) -> None:
        """Have something done on this thread and the policy told what follows; called on any other, which waits."""
        self._orders.carry_out(self.inbox.put, do)

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
        wake_ns = self._wake_ns
        self._launcher.begin_turn()
        items = self.inbox.take(None if wake_ns is None else max(0, wake_ns - self._clock()) / 1e9)
        self._busy_since_ns = self._clock()
        handing_on.begin(self)
        kinds = set(map(type, items))
        is_last = Stop in kinds
        try:
            if kinds == {Request}:
                self._tell(Submitted(tuple(items)))
            else:
                self._handle(items or [Timer()])  # also after a Stop: orders are waited for
            self._launcher.hand_out(everything=is_last)
        except PolicyError as e:
            self.lose(e)
        except BaseException:  # a bug of ours must not leave everybody waiting for ever
            if self.failure is None:  # else the requests that it was about have ended meanwhile
                LOG.exception("the driver failed; every request that waits ends with DeviceError")
            self.lose(DeviceError("the runtime's driver failed; its log has the traceback. Restart the runtime"))
        self._busy_since_ns = self._asked_ns = None
        handing_on.end(self)
        return not is_last

    def _handle(self, items: Sequence[Any]) -> None:
        """In their order, but for requests and ends of bundles with nothing else between them."""
        together: list[Request | Completed] = []
        for item in items:
            if type(item) is Request or type(item) is Completed:
                together.append(item)
                continue
            if type(item) is Look:
                continue
            self._tell_together(together)
            together.clear()
            if isinstance(item, Order | Exhausted):
                self._launcher.hand_out(everything=True)  # an order takes as long as it likes
                for event in item.do() if isinstance(item, Order) else self._maker.exhausted(*item):
                    self._tell(event)
                if isinstance(item, Order):
                    item.told()
            elif isinstance(item, Lost):
                self.lose(item.error)
            elif not isinstance(item, Stop):
                self._tell(item)
        self._tell_together(together)

    def _tell_together(self, together: Sequence[Request | Completed]) -> None:
        """The ends first: requests are admitted by what is known of the device."""
        arrived = tuple([item for item in together if type(item) is Request])
        ended = [item for item in together if type(item) is Completed]
        events: list[Event] = [own._replace(followed=True) for own in ended] if arrived else [*ended]
        if arrived:
            events.append(Submitted(arrived))
        if arrived and self._elsewhere is not None:  # it is asked once: upon ends that are followed nothing is launched
            self._tell(*events)
            return
        for event in events:
            self._tell(event)

    def _tell(self, *events: Event) -> None:
        """At one time; several only where the policy is elsewhere."""
        now_ns = self._clock()
        self._wake_ns = None
        for event in events:
            if isinstance(event, CatalogChanged):
                self._forms = {e.id: e.entries for e in event.catalog.executables}
                self._launcher.forget_all_but(self._forms)
            elif self.failure is None and isinstance(event, Completed):
                self._launcher.note_completed()
        if self.failure is not None:
            return self.book.end_all(self.failure, Reason.DEVICE)
        self._asked_ns, own, one = now_ns, self._elsewhere, self._policy.on_event
        answers = own.on_events(events, now_ns) if own is not None else [one(event, now_ns) for event in events]
        self._asked_ns = None
        for event, commands in zip(events, answers, strict=True):
            self._wake_ns = None  # each asks anew
            self._follow(event, now_ns, commands)

    def _follow(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        """What the policy has answered."""
        if type(event) is Submitted and not self.book.note_told(event.requests):
            return self.book.end_all(self.last_error, Reason.DEVICE)  # some have ended meanwhile: so do all
        self._observers.decided(event, now_ns, commands)
        refused = [command for command in commands if type(command) is Reject]
        stopped = self._stop(refused) if refused else {}
        for command in commands:
            if type(command) is not Reject:
                self._does[type(command)](command, now_ns)
        if stopped:  # after what is dispatched, for which the device may be waiting; who hangs there has claimed none
            self._reject(stopped, now_ns)

    # Commands

    def _dispatch(self, command: Dispatch, now_ns: int) -> None:
        entries = [[self.book.tickets[i] for i in lanes] for lanes in command.lanes]
        self._launcher.launch(Leaving(command, self._forms[command.executable], entries, now_ns))

    def _stop(self, refused: Sequence[Reject]) -> dict[Ticket, Reason]:
        """Who is to be told why; what they held on the device is free for others."""
        known = {own: command.reason for command in refused if (own := self.book.tickets.get(command.request))}
        self._machine.release([ticket for ticket in known if not ticket.claimed])
        return known

    def _reject(self, stopped: Mapping[Ticket, Reason], now_ns: int) -> None:
        ended = {ticket: stopped[ticket] for ticket in self.book.claim(stopped)}
        self._observers.rejected_together(ended, now_ns)
        tell([Ending(ticket, None, error_of(ticket, reason, now_ns)) for ticket, reason in ended.items()])
        self.book.forget(list(ended))

    def _wake_at(self, command: WakeAt, now_ns: int) -> None:
        self._wake_ns = command.time_ns

    # The end of all

    def lose(self, error: ServingError) -> None:
        """The device is gone, or who decides: nothing will be dispatched any more. Called on any thread."""
        with self._losing:
            first, self.failure = self.failure is None, self.failure or error
        if first:
            LOG.error(str(error))
        if self._elsewhere is not None and isinstance(error, PolicyError):
            self._elsewhere.close()  # the driver's thread may be waiting for it
        self._wake_ns = None
        self._orders.fail_all(self.failure)
        self._maker.give_up(self.failure)
        self.book.end_all(self.failure, Reason.DEVICE)

    def _overdue(self) -> ServingError | None:
        """What hangs, if something does; called on the watchdog's thread."""
        now_ns, since_ns, asked_ns = self._clock(), self._busy_since_ns, self._asked_ns
        limit = f"for {self._hang_ns / 1e9:g} s; it hangs. Restart the"
        if asked_ns is not None:  # the policy is yet to be told what the device has done
            slow = f"the policy has not answered {limit} process, or the runtime if the policy has its own process"
            return PolicyError(slow) if now_ns - asked_ns > self._hang_ns else None
        if self._launcher.is_overdue(now_ns):
            return DeviceError(f"a bundle is on the device {limit} process")
        waits = since_ns is not None and now_ns - since_ns > self._hang_ns
        return DeviceError(f"the device has kept the runtime's driver waiting {limit} process") if waits else None
