"""A device and everything that serves on it: what decides, what makes executables, and where tenants live."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from coalesce.runtime.accounts import Accounts
from coalesce.runtime.device import Device
from coalesce.runtime.driver import Driver
from coalesce.runtime.elsewhere import Elsewhere
from coalesce.runtime.errands import Errands
from coalesce.runtime.foundry import Foundry
from coalesce.runtime.health import Health
from coalesce.runtime.history import History
from coalesce.runtime.observer import Observer, Observers
from coalesce.runtime.quarters import Quarters
from coalesce.runtime.terms import left_s
from coalesce.scheduler.events import Closed
from coalesce.scheduler.policy import Policy


class Setup(NamedTuple):
    """How each device is used: see the arguments of `Runtime`. Programs are made inside of what `around` gives."""

    widths: Sequence[int]  # ascending
    capacity: int | None
    segments: int | None
    executables: int
    hang_s: float
    stall_s: float
    around: Callable[[], Any]
    errands: Errands


class Station:
    def __init__(
        self,
        number: int,
        device: Device,
        policy: Policy,
        accounts: Accounts,
        observers: Sequence[Observer],
        clock: Callable[[], int],
        setup: Setup,
    ) -> None:
        self.number, self.device, self._policy, self._clock = number, device, policy, clock
        self.history = History()
        watching = Observers([accounts, self.history, *(observer.on(number) for observer in observers)])
        self.foundry = Foundry(device, setup.widths, setup.executables, setup.stall_s, setup.around)
        self.driver = Driver(policy, device, watching, clock, self.foundry, setup.hang_s)
        own = setup.widths, setup.capacity, setup.segments
        self.quarters = Quarters(device, self.driver, self.foundry, accounts, *own, setup.errands)
        self.foundry.start(self.driver)
        self.driver.start()

    def explain(self, request: int) -> str | None:
        """What was decided about a request; None if it is not known here."""
        ticket = self.driver.book.tickets.get(request)  # looked for first: it is remembered before it is forgotten here
        return self.history.explain(request, ticket, self._clock())

    @property
    def status(self) -> str:
        return "failed" if self.driver.failure is not None else "closed" if self.driver.stopped else "serving"

    def close(self, until: float | None, called_until: Callable[[], float | None]) -> None:
        """After what waits, which the driver was told of, and after callbacks, whose time may become less meanwhile."""
        if not self.driver.book.wait_empty(left_s(until)):
            self.driver.inbox.put(Closed(drain=False))
            self.driver.book.wait_empty(None)
        self.foundry.stop()
        self.driver.stop(called_until)
        if isinstance(self._policy, Elsewhere):
            self._policy.close()


def wait_ended(drivers: Sequence[Driver], timeout_s: float | None) -> bool:
    """Whether every request has ended and whoever is called back was, also of those that callbacks have sent, on
    whatever device; after at most so long. Callbacks that ask would wait for each other: it is about requests then."""
    until = None if timeout_s is None else time.monotonic() + timeout_s
    books, callbacks = [driver.book for driver in drivers], [driver.callbacks for driver in drivers]
    if threading.current_thread() in [own.thread for own in callbacks]:
        return all(book.wait_empty(left_s(until)) for book in books)
    while True:
        asked = [own.asked for own in callbacks]
        if not all(book.wait_empty(left_s(until)) for book in books):
            return False
        if not all(own.wait_called(left_s(until)) for own in callbacks):
            return False
        if not any(book.tickets for book in books) and asked == [own.asked for own in callbacks]:
            return True


def health_of(stations: Sequence[Station], tenants: int, closed: bool, alone: Mapping[str, str]) -> Health:
    failures = [station.driver.failure for station in stations if station.driver.failure is not None]
    ordered = [station.foundry.ordered() for station in stations]
    status = "closed" if closed else "serving"
    if failures:
        status = "failed" if len(failures) == len(stations) else "degraded"
    return Health(
        status,
        "; ".join(map(str, failures)),
        tenants,
        sum(len(station.driver.book.tickets) for station in stations),
        sum(len(station.device.catalog.executables) for station in stations),
        sum(compiling for compiling, _ in ordered),
        MappingProxyType({name: why for station in stations for name, why in failed_of(station, len(stations) > 1)}),
        sum(station.device.held_bytes for station in stations),
        MappingProxyType({str(station.device.at): station.status for station in stations}),
        MappingProxyType(dict(alone)),
    )


def failed_of(station: Station, several: bool) -> list[tuple[str, str]]:
    """Families are numbered by device."""
    where = f"{station.device.at}: " if several else ""
    return [(where + name, why) for name, why in station.foundry.ordered()[1].items()]
