"""Where the tenants of one device live: a bank for each schema, a slot of it for each tenant.

    take_in   a host for the schema -> a slot of its bank -> weights -> verified, if asked for -> the policy is told
    let_go    the slot is free; a bank that nobody reads any more goes

Each arrow to the device is an order to the driver, done between two dispatches. Tenants of one schema come and go one
at a time; those of others do not wait for them, and for no compiler that works for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from coalesce import jaxpr as J
from coalesce.errors import CompileError, TenantClosed
from coalesce.runtime.accounts import Accounts
from coalesce.runtime.cutting import look_again, tenant_of
from coalesce.runtime.device import Device
from coalesce.runtime.driver import Driver
from coalesce.runtime.errands import Errands
from coalesce.runtime.form import example_of, Form
from coalesce.runtime.foundry import Foundry
from coalesce.runtime.host import courses_of, first_capacities, Host, pool_bytes, reserve
from coalesce.runtime.rehearse import rehearse
from coalesce.runtime.site import Site
from coalesce.runtime.ticket import Ticket
from coalesce.runtime.weights import check_bits, Types
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.events import CatalogChanged, Event, TenantAdded, TenantRemoved
from coalesce.scheduler.request import Request
from coalesce.serving.fit import Fit
from coalesce.serving.store import Preparer, Rows, Store

LOG = logging.getLogger("coalesce.runtime")


class Resident:
    """A tenant, and where it lives. `terms` are those of its `Tenant`."""

    def __init__(self, name: str, fn: Callable[..., Any], shapes: Sequence[tuple[Any, ...]], terms: dict) -> None:
        self.name, self.fn, self.shapes, self.terms = name, fn, shapes, terms
        self.alone = ""  # why it shares no bundles with others, if it does not
        self.left = False  # nobody may ask for it any more, or write its weights: others may have its name and slot
        self.forms: list[Form] = []
        self.weights: Types  # of its params
        self.slot = -1
        self.host: Host
        self.quarters: Quarters
        self.driver: Driver


def check_here(resident: Resident) -> None:
    """Raises TenantClosed for one that was removed since it was asked for."""
    if resident.left:
        raise TenantClosed(f"tenant {resident.name!r} was removed meanwhile; add_tenant adds one")


class Quarters:
    def __init__(
        self,
        device: Device,
        driver: Driver,
        foundry: Foundry,
        accounts: Accounts,
        widths: Sequence[int],
        capacity: int | None,
        segments: int | None,
        errands: Errands,
    ) -> None:
        self._site = Site(device, driver, foundry, widths, errands)
        self._device, self._driver, self._foundry, self._accounts = device, driver, foundry, accounts
        self._capacity, self._segments = capacity, segments

    def take_in(self, resident: Resident, fitted: Fit, check: Callable[[Resident], None] | None) -> None:
        """Give a tenant a place and have it served from then on; `check` may raise before anybody can ask for it."""
        with self._site.apart(fitted.key), self._device.here():
            host = self._device.hosts.get(fitted.key) or self._host(resident, fitted)
            try:
                self._settle(resident, fitted, host, check)
            except BaseException:
                if not host.tenants:
                    self._close(host)
                raise
            if not resident.alone:
                self._site.order_all(host, host.courses)
        if self._segments is None:
            look_again(self._site)

    def try_out(self, resident: Resident, index: int, inputs: tuple[Any, ...]) -> list[Any]:
        """What it gets for a request of its shape `index`, in each lane of an executable: the narrowest for several
        lanes that there is, or else the narrowest."""
        course, form = resident.host.courses[index], resident.forms[index]
        request = Request(-1, resident.name, course.family, 0, 0)

        def with_lanes(width: int) -> list[Any]:
            for made in self._site.order(course, width, urgent=True):
                made.result()
            tickets = [Ticket(request, resident, form, form.accept(inputs), None) for _ in range(width)]
            for ticket in tickets:
                ticket.bundles.append(-1)
            numbers = [self._device.number_of((Entry(course.family, s, width),)) for s in range(len(course.segments))]
            bundle = rehearse(self._driver, [lambda n=n: self._device.try_out(n, [tickets]) for n in numbers])
            (results,) = bundle.results()
            assert results is not None, f"tenant {resident.name!r}: the last segment has no results"
            return list(results)

        for width in (*(w for w in self._site.widths if w > 1), self._site.widths[0]):
            with suppress(CompileError):  # it cannot be made, or was dropped: then the next
                return with_lanes(width)
        raise AssertionError(f"family {course.family} is served, and has no executable")

    def write(self, resident: Resident, fitted: Fit) -> None:
        """Other weights for a tenant."""
        with self._device.here():
            rows = resident.host.prepare(fitted)
        written = []

        def write() -> Sequence[Event]:
            check_here(resident)
            if not resident.host.reserve:  # no lane is between two segments
                resident.host.store.write(resident.slot, rows)
                written.append(resident)
            return ()

        self._driver.carry_out(write)
        if not written:
            replaced = Future[None]()  # on a thread of its own, which goes on if this one is interrupted
            self._site.errands.thread("replace", partial(self._replace, resident, rows, replaced)).start()
            replaced.result()

    def _replace(self, resident: Resident, rows: Rows, replaced: Future[None]) -> None:
        try:
            self._move(resident, rows)
        except BaseException as e:
            replaced.set_exception(e)
        else:
            replaced.set_result(None)

    def _move(self, resident: Resident, rows: Rows) -> None:
        """Into another slot, so that lanes that are between two segments go on with what they began with."""
        store = resident.host.store
        with self._site.apart(resident.host.schema.key):
            check_here(resident)
            old, new = resident.slot, store.take()

            def move() -> Sequence[Event]:
                store.write(new, rows)
                resident.slot = new
                return ()

            def are_done(tickets: Sequence[Ticket]) -> bool:
                states = [t.state for t in tickets if t.resident is resident]
                return all(state is None or state.weights != old for state in states)

            self._driver.carry_out(move)
            self._driver.book.wait_for(are_done, None)
            store.release(old)

    def let_go(self, resident: Resident) -> None:
        with self._site.apart(resident.host.schema.key):
            self._free(resident)
            if not resident.host.tenants:
                self._close(resident.host)

    def forget(self, resident: Resident) -> None:
        """Of one that was let go: `stats` knows nothing of it any more."""
        self._accounts.close(resident.name)

    def _settle(self, resident: Resident, fitted: Fit, host: Host, check: Callable[[Resident], None] | None) -> None:
        if host.store.free <= host.reserve:
            self._site.grow(host)
        rows = host.prepare(fitted)
        pairs = zip(fitted.programs, host.families, fitted.inputs, strict=True)
        resident.forms = [Form(program, family, order) for program, family, order in pairs]
        resident.host, resident.slot = host, host.store.take()
        resident.quarters, resident.driver = self, self._driver
        host.residents.append(resident)
        self._accounts.open(resident.name, resident.alone)
        tenant = tenant_of(resident)
        try:
            self._driver.carry_out(lambda: host.store.write(resident.slot, rows) or ())
            if check is not None:
                check(resident)
            self._driver.carry_out(lambda: [TenantAdded(tenant)])
        except BaseException:
            self._driver.inbox.put(TenantRemoved(resident.name, drain=False))  # for who was interrupted after it came
            self._free(resident)
            self.forget(resident)
            raise

    def _free(self, resident: Resident) -> None:
        resident.host.store.release(resident.slot)
        resident.host.residents.remove(resident)

    def _host(self, resident: Resident, fitted: Fit) -> Host:
        """A bank for a schema that is new here, and its narrowest executables."""
        inside = J.takes_wide()
        self._driver.carry_out(lambda: check_bits(fitted.programs, inside))
        if resident.alone:
            schema, counts = self._device.plan_as_it_is(fitted), [1]
        else:
            schema = self._device.plan(fitted, self._segments, self._site.patience_us(None))
            counts = [self._capacity] if self._capacity else first_capacities(schema)
            counts = [count + reserve(schema.segments) for count in counts]
        lanes = self._site.lanes
        beside = schema.shared_bytes + pool_bytes(schema.segments, lanes)
        asked = " (see Runtime(capacity=))" if self._capacity else ""

        def needed(count: int) -> int:  # and where there is a choice, room to prepare the next one's weights
            return (count + (count > counts[-1])) * schema.slot_bytes + beside

        def what(count: int) -> str:
            return f"tenant {resident.name!r}, with room for {count} of its kind{asked},"

        prepare = Preparer(schema, self._device.make)
        with self._site.rooms:
            capacity = self._device.room_for(counts, needed, what)
            store = Store(schema, capacity, prepare(fitted), self._device.make)
            families = self._device.next_families(len(schema.templates))
            each = zip(fitted.programs, fitted.inputs, resident.shapes, strict=True)
            courses = courses_of(families, schema.segments, lanes, [example_of(*one) for one in each])
            host = Host(schema, prepare, store, courses)
            self._driver.carry_out(lambda: self._device.admit(host) or ())
        for course in host.courses:
            LOG.info("family %d of tenant %r: %s", course.family, resident.name, course.segments.why)
        width = 1 if resident.alone else self._site.widths[0]
        narrowest = [made for course in host.courses for made in self._site.order(course, width, urgent=True)]
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
            catalog = self._device.dismiss(host)
            host.let_go()
            return [CatalogChanged(catalog)]

        self._driver.carry_out(dismiss)
        self._foundry.forget(host.families)
