"""Where the tenants of one device live: a bank for each schema, a slot of it for each tenant.

    take_in   a host for the schema -> a slot of its bank -> weights -> verified, if asked for -> the policy is told
    let_go    the slot is free; a bank that nobody reads any more goes

Each arrow to the device is an order to the driver, done between two dispatches. Tenants of one schema come and go one
at a time; those of others do not wait for them, and for no compiler that works for them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from coalesce.runtime.accounts import Accounts
from coalesce.runtime.device import Device
from coalesce.runtime.driver import Driver
from coalesce.runtime.form import Form
from coalesce.runtime.foundry import Foundry
from coalesce.runtime.host import first_capacity, Host
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.events import CatalogChanged, Event, TenantAdded
from coalesce.scheduler.request import Tenant
from coalesce.serving.fit import Fit
from coalesce.serving.store import Preparer, Store

LOG = logging.getLogger("coalesce.runtime")


class Resident:
    """A tenant, and where it lives. `terms` are those of its `Tenant`."""

    def __init__(self, name: str, fn: Callable[..., Any], shapes: Sequence[tuple[Any, ...]], terms: dict) -> None:
        self.name, self.fn, self.shapes, self.terms = name, fn, shapes, terms
        self.forms: list[Form] = []
        self.slot = -1
        self.host: Host
        self.quarters: Quarters
        self.driver: Driver


class Quarters:
    def __init__(
        self,
        device: Device,
        driver: Driver,
        foundry: Foundry,
        accounts: Accounts,
        widths: Sequence[int],
        capacity: int | None,
    ) -> None:
        self._device, self._driver, self._foundry, self._accounts = device, driver, foundry, accounts
        self._widths, self._capacity = widths, capacity
        self._taken: set[Hashable] = set()  # schemas that somebody is at work on
        self._free = threading.Condition()
        self._rooms = threading.Lock()  # so that two new banks are not promised the same memory

    def take_in(self, resident: Resident, fitted: Fit, check: Callable[[Resident], None] | None) -> None:
        """Give a tenant a place and have it served from then on; `check` may raise before anybody can ask for it."""
        with self._apart(fitted.key), self._device.here():
            host = self._device.hosts.get(fitted.key) or self._host(resident, fitted)
            try:
                self._settle(resident, fitted, host, check)
            except BaseException:
                if not host.tenants:
                    self._close(host)
                raise
        for family in host.families:
            for width in self._widths:
                if width < 2 * host.tenants:
                    self._foundry.order((Entry(family, 0, width),))

    def write(self, resident: Resident, fitted: Fit) -> None:
        """Other weights for a tenant."""
        with self._device.here():
            rows = resident.host.prepare(fitted)
        self._driver.carry_out(lambda: resident.host.store.write(resident.slot, rows) or ())

    def let_go(self, resident: Resident) -> None:
        with self._apart(resident.host.schema.key):
            self._leave(resident)
            if not resident.host.tenants:
                self._close(resident.host)

    @contextmanager
    def _apart(self, schema: Hashable) -> Iterator[None]:
        """Nobody else is at work on that schema."""
        with self._free:
            self._free.wait_for(lambda: schema not in self._taken)
            self._taken.add(schema)
        try:
            yield
        finally:
            with self._free:
                self._taken.discard(schema)
                self._free.notify_all()

    def _settle(
        self, resident: Resident, fitted: Fit, host: Host, check: Callable[[Resident], None] | None
    ) -> None:
        if not host.store.free:
            self._grow(host)
        rows = host.prepare(fitted)
        pairs = zip(fitted.programs, host.families, fitted.inputs, strict=True)
        resident.forms = [Form(program, family, order) for program, family, order in pairs]
        resident.host, resident.slot = host, host.store.take()
        resident.quarters, resident.driver = self, self._driver
        host.tenants += 1
        self._accounts.open(resident.name)
        tenant = Tenant(resident.name, tuple(host.families), **resident.terms)
        try:
            self._driver.carry_out(lambda: host.store.write(resident.slot, rows) or ())
            if check is not None:
                check(resident)
            self._driver.carry_out(lambda: [TenantAdded(tenant)])
        except BaseException:
            self._leave(resident)
            raise

    def _leave(self, resident: Resident) -> None:
        resident.host.store.release(resident.slot)
        resident.host.tenants -= 1
        self._accounts.close(resident.name)

    def _host(self, resident: Resident, fitted: Fit) -> Host:
        """A bank for a schema that is new here, and its narrowest executables."""
        schema = self._device.plan(fitted)
        capacity = self._capacity or first_capacity(schema)
        needed = capacity * schema.slot_bytes + schema.shared_bytes
        prepare = Preparer(schema)
        with self._rooms:
            self._device.check_room(f"tenant {resident.name!r}, with room for {capacity} of its kind,", needed)
            store = Store(schema, capacity, prepare(fitted))
            host = Host(schema, prepare, store, self._device.next_families(len(schema.templates)))
            self._driver.carry_out(lambda: self._device.admit(host) or ())
        narrowest = [self._foundry.order((Entry(f, 0, self._widths[0]),), urgent=True) for f in host.families]
        try:
            for made in narrowest:
                made.result()
        except BaseException:
            self._close(host)
            raise
        return host

    def _close(self, host: Host) -> None:
        """Nobody reads its bank any more."""

        def dismiss() -> Sequence[Event]:
            return [CatalogChanged(self._device.dismiss(host))]

        self._driver.carry_out(dismiss)
        self._foundry.forget(host.families)

    def _grow(self, host: Host) -> None:
        """Room for twice as many. One whose narrowest executables cannot be made for that stays as it is."""
        capacity = 2 * host.store.capacity
        with self._rooms:
            self._device.check_room(f"room for {capacity} tenants of {host}", host.store.bytes_to_grow(capacity))
            host.store.make_ready(capacity)
        ordered = {
            entries: self._foundry.order(entries, (capacity,) * len(entries), urgent=True)
            for entries in self._device.entries_of(host)
        }
        for entries, made in ordered.items():
            error = made.exception()
            if error is not None and entries[0].width == self._widths[0]:
                raise error  # a wider one that fails is offered no more

        def grow() -> Sequence[Event]:
            return [CatalogChanged(self._device.grow(host, capacity))]

        self._driver.carry_out(grow)
        LOG.info("%s has room for %d tenants", host, capacity)
