"""Who watches the runtime: accounts, records, logs and metrics are told the same few things.

They are told on the driver's and the finisher's threads (of a request that is sent, on the caller's), so they are quick
and never wait. One that raises is dropped, with its traceback in the log: the runtime goes on, whatever it was. A
SystemExit would end a thread that everybody is served on; but one that a signal handler raises on the caller's is his.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from coalesce.runtime.ticket import Ending, Ticket
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.commands import Command, Dispatch, Reason
from coalesce.scheduler.events import Event

LOG = logging.getLogger("coalesce.runtime")


class Recorded(NamedTuple):
    """What can be kept of a bundle without keeping what its requests brought."""

    dispatch: Dispatch
    form: tuple[Entry, ...]
    start_ns: int
    end_ns: int
    error: str  # empty if it did not fail

    @property
    def lanes(self) -> int:
        return sum(map(len, self.dispatch.lanes))

    @property
    def width(self) -> int:
        return sum(entry.width for entry in self.form)


class Finished(NamedTuple):
    """A bundle that has left the device, or failed on it, and what it was on the way with."""

    dispatch: Dispatch
    form: tuple[Entry, ...]  # what its executable has room for
    entries: Sequence[Sequence[Ticket]]  # the requests in each entry of it
    start_ns: int
    end_ns: int
    error: Exception | None

    @property
    def took_ns(self) -> int:
        return self.end_ns - self.start_ns

    @property
    def lanes(self) -> int:
        return sum(map(len, self.entries))

    @property
    def width(self) -> int:
        return sum(entry.width for entry in self.form)

    def lanes_of_tenants(self) -> Counter[str]:
        return Counter(ticket.request.tenant for tickets in self.entries for ticket in tickets)

    def record(self) -> Recorded:
        text = f"{type(self.error).__name__}: {self.error}" if self.error is not None else ""
        return Recorded(self.dispatch, self.form, self.start_ns, self.end_ns, text)


class Observer:
    """What can be watched; times are of the runtime's clock, in nanoseconds."""

    def on(self, device: int) -> Observer:
        """Who watches that device of several, each of which counts its own bundles and executables from 0."""
        return self

    def sent(self, ticket: Ticket) -> None:
        """A request is about to be sent to the driver; told on the thread that submits it."""

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        """The policy was told an event and answered."""

    def rejected(self, ticket: Ticket, reason: Reason, now_ns: int) -> None:
        """A request ended without a result."""

    def rejected_together(self, stopped: Mapping[Ticket, Reason], now_ns: int) -> None:
        """Several did, at once: far past what a device can do most requests end so."""
        for ticket, reason in stopped.items():
            self.rejected(ticket, reason, now_ns)

    def finished(self, bundle: Finished) -> None:
        """A bundle left the device, or failed on it."""

    def ended(self, endings: Sequence[Ending], now_ns: int) -> None:
        """Requests ended with results."""


class Observers(Observer):
    """Tells each of them what it listens to: requests pay for everybody who is told."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._set(observers)

    def add(self, observer: Observer) -> None:
        self._set([*self._observers, observer])

    def _set(self, observers: Sequence[Observer]) -> None:
        self._observers = list(observers)
        self._sent = listening(observers, "sent")
        self.hear_sent = bool(self._sent)  # else who sends need not tell
        self._decided = listening(observers, "decided")
        self._rejected = listening(observers, "rejected")
        self._rejected_together = [(own, own.rejected_together) for own, _ in self._rejected]
        self._finished = listening(observers, "finished")
        self._ended = listening(observers, "ended")

    def sent(self, ticket: Ticket) -> None:
        self._tell(self._sent, ticket, drops=Exception)

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        self._tell(self._decided, event, now_ns, commands)

    def rejected(self, ticket: Ticket, reason: Reason, now_ns: int) -> None:
        self._tell(self._rejected, ticket, reason, now_ns)

    def rejected_together(self, stopped: Mapping[Ticket, Reason], now_ns: int) -> None:
        if stopped:
            self._tell(self._rejected_together, stopped, now_ns)

    def finished(self, bundle: Finished) -> None:
        self._tell(self._finished, bundle)

    def ended(self, endings: Sequence[Ending], now_ns: int) -> None:
        self._tell(self._ended, endings, now_ns)

    def _tell(self, listeners: Sequence[Listener], *args: Any, drops: type[BaseException] = BaseException) -> None:
        for observer, tell in listeners:
            try:
                tell(*args)
            except drops:
                LOG.exception("%r raised in %s() and is not told anything any more", observer, tell.__name__)
                self._set([other for other in self._observers if other is not observer])


Listener = tuple[Observer, Callable[..., None]]


def listening(observers: Sequence[Observer], what: str) -> list[Listener]:
    return [(o, getattr(o, what)) for o in observers if getattr(type(o), what) is not getattr(Observer, what)]
