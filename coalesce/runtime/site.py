"""The banks of one device, and what is made for them: for those who move tenants in and out, and who cut programs.

Whoever changes something at a schema does it `apart`; every step on the device is an order to the driver, done between
two dispatches.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from coalesce.runtime.device import Device
from coalesce.runtime.driver import Driver
from coalesce.runtime.errands import Errands
from coalesce.runtime.foundry import Foundry
from coalesce.runtime.host import Course, Host, lanes_for, next_capacities
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.events import CatalogChanged, Event

LOG = logging.getLogger("coalesce.runtime")

LOOK_S = 1.0  # whoever was interrupted may have woken nobody


class Site:
    def __init__(
        self, device: Device, driver: Driver, foundry: Foundry, widths: Sequence[int], errands: Errands
    ) -> None:
        self.device, self.driver, self.foundry, self.widths, self.errands = device, driver, foundry, widths, errands
        self.lanes = lanes_for(widths)
        self.rooms = threading.Lock()  # so that two new banks are not promised the same memory
        self._taken: dict[Hashable, object] = {}  # schemas that somebody is at work on, and who
        self._free = threading.Condition()

    @contextmanager
    def apart(self, schema: Hashable) -> Iterator[None]:
        """Nobody else is at work on that schema. Ctrl-C may come anywhere here, and leaves it to nobody."""
        who = object()
        try:
            with self._free:
                while schema in self._taken:
                    self._free.wait(LOOK_S)
                self._taken[schema] = who
            yield
        finally:
            if schema in self._taken and self._taken[schema] is who:
                del self._taken[schema]
            with self._free:
                self._free.notify_all()

    def patience_us(self, host: Host | None) -> float | None:
        """What a bundle of a program may take that the most urgent tenant of others finds on the device: half of what
        that has."""
        others = [resident for own in list(self.device.hosts.values()) if own is not host for resident in own.residents]
        return min((resident.terms["slo_ns"] / 2e3 for resident in others), default=None)

    def order(self, course: Course, width: int, urgent: bool = False) -> list[Future[None]]:
        """Executables of all its segments."""
        entries = [Entry(course.family, s, width) for s in range(len(course.segments))]
        return [self.foundry.order((entry,), urgent=urgent) for entry in entries]

    def order_all(self, host: Host, courses: Sequence[Course]) -> list[Future[None]]:
        """As wide as two lanes for each tenant, and for a single one as wide as one. Those that are to be waited for:
        the widest will be there soon."""
        most = 2 * host.tenants if host.tenants > 1 else 1
        widths = [width for width in self.widths if width <= most] or self.widths[:1]
        made = {width: [one for course in courses for one in self.order(course, width)] for width in widths}
        return [one for width in widths if width < most or width == widths[0] for one in made[width]]

    def grow(self, host: Host) -> None:
        """Room for twice as many, or for fewer where memory is short. One whose narrowest executables cannot be made
        for that stays as it is."""
        store = host.store
        with self.rooms:
            counts = next_capacities(store.capacity)
            capacity = self.device.room_for(counts, store.bytes_to_grow, lambda n: f"room for {n} tenants of {host}")
            store.make_ready(capacity)
        ordered = {
            entries: self.foundry.order(entries, (capacity,) * len(entries), urgent=True)
            for entries in self.device.entries_of(host)
        }
        for entries, made in ordered.items():
            error = made.exception()
            if error is not None and entries[0].width == self.widths[0]:
                raise error  # a wider one that fails is offered no more

        def grow() -> Sequence[Event]:
            return [CatalogChanged(self.device.grow(host, capacity))]

        self.driver.carry_out(grow)
        LOG.info("%s has room for %d tenants", host, capacity)
