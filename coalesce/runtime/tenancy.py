"""Tenants coming, changing and going, while others are served.

    add       trace -> fit -> a host for its schema -> a slot of its bank -> weights -> the policy is told
    update    fit again -> weights
    remove    the policy is told -> its last request ends -> the slot is free

Each arrow to the device is an order to the driver, done between two dispatches. Tenants are placed one at a time.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from coalesce.errors import InvalidInput
from coalesce.passes.pipeline import normalise, Normalised
from coalesce.runtime.accounts import Accounts
from coalesce.runtime.device import Device
from coalesce.runtime.driver import Driver, Order
from coalesce.runtime.form import Form
from coalesce.runtime.foundry import Foundry
from coalesce.runtime.host import Course, courses_of, first_capacity, Host, pool_bytes, reserve
from coalesce.runtime.ticket import Ticket
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.events import CatalogChanged, Event, TenantAdded, TenantRemoved
from coalesce.scheduler.request import Tenant
from coalesce.serving.fit import Fit, fit
from coalesce.serving.store import Preparer, Rows, Store
from coalesce.tracing import trace

LOG = logging.getLogger("coalesce.runtime")

REMEMBERED = 64  # normalised programs
LANES = 4  # that a program's pool has room for, times the widest executable
T = TypeVar("T")


class Resident:
    """A tenant. `terms` are those of its `Tenant`."""

    def __init__(self, name: str, fn: Callable[..., Any], shapes: Sequence[tuple[Any, ...]], terms: dict) -> None:
        self.name, self.fn, self.shapes, self.terms = name, fn, shapes, terms
        self.forms: list[Form] = []
        self.host: Host | None = None
        self.slot = -1


class Tenancy:
    def __init__(
        self,
        device: Device,
        driver: Driver,
        foundry: Foundry,
        accounts: Accounts,
        widths: Sequence[int],
        capacity: int | None,
        segments: int | None,
    ) -> None:
        self._device, self._driver, self._foundry, self._accounts = device, driver, foundry, accounts
        self._widths, self._capacity, self._segments = widths, capacity, segments
        self.residents: dict[str, Resident] = {}  # that requests are taken for
        self._names: set[str] = set()  # those, and who comes or goes
        self._normalised: OrderedDict[int, tuple[Any, Normalised]] = OrderedDict()
        self._lock = threading.Lock()

    def add(
        self, name: str, fn: Callable[..., Any], params: Any, shapes: Sequence[Any], shared: Any, terms: dict
    ) -> None:
        with self._lock:
            if name in self._names:
                raise InvalidInput(f"there is a tenant {name!r} already; update_tenant gives it other weights")
            self._names.add(name)
        resident = Resident(name, fn, shapes, terms)
        try:
            fitted = self._fit(resident, params, shared)
            with self._lock:
                self._place(resident, fitted)
        except BaseException:
            with self._lock:
                self._names.discard(name)
            raise

    def update(self, resident: Resident, params: Any, shared: Any) -> None:
        fitted, host = self._fit(resident, params, shared), resident.host
        assert host is not None, f"tenant {resident.name!r} is served without a host"
        if fitted.key != host.schema.key:
            raise InvalidInput(
                f"tenant {resident.name!r}: with these params it would be another program, or share other weights;"
                " give params of the same tree, shapes and dtypes, or add it as another tenant"
            )
        rows = host.prepare(fitted)
        if host.reserve:
            self._replace(resident, host, rows)
        else:
            self._do(lambda: host.store.write(resident.slot, rows))
        LOG.info("tenant %r has other weights", resident.name)

    def _replace(self, resident: Resident, host: Host, rows: Rows) -> None:
        """Into another slot, that lanes which are between two segments go on with what they began with."""
        with self._lock:
            old, new = resident.slot, host.store.take()

            def move() -> None:
                host.store.write(new, rows)
                resident.slot = new

            try:
                self._do(move)
            except BaseException:
                host.store.release(new)
                raise

            def done(tickets: Sequence[Ticket]) -> bool:
                states = [t.state for t in tickets if t.resident is resident]
                return all(state is None or state.weights != old for state in states)

            self._driver.wait_for(done, None)
            host.store.release(old)

    def remove(self, resident: Resident, drain: bool, timeout_s: float | None) -> None:
        if self.residents.pop(resident.name, None) is None:
            return  # another thread removes it
        left = Future[None]()

        def free() -> None:
            self._driver.wait_for(lambda tickets: not any(t.resident is resident for t in tickets), None)
            with self._lock:
                self._leave(resident)
                self._names.discard(resident.name)
            LOG.info("tenant %r has left", resident.name)
            left.set_result(None)

        self._tell(lambda: [TenantRemoved(resident.name, drain)])
        threading.Thread(target=free, name=f"coalesce-remove-{resident.name}", daemon=True).start()
        left.result(timeout_s)

    def _fit(self, resident: Resident, params: Any, shared: Any) -> Fit:
        programs = []
        for shape in resident.shapes:
            program = trace(resident.fn, params, *shape, name=resident.name, shared=shared)
            done = self._normalise(program)
            programs.append(program.with_jaxpr(done.program.jaxpr, done.program.prepare))
        return fit(programs)

    def _normalise(self, program: Any) -> Normalised:
        """Tenants with one traced function differ in weights alone: the passes run once for all of them."""
        with self._lock:
            known = self._normalised.get(id(program.jaxpr))
        if known is not None:
            return known[1]
        done = normalise(program.without_values())
        with self._lock:
            self._normalised[id(program.jaxpr)] = (program.jaxpr, done)
            if len(self._normalised) > REMEMBERED:
                self._normalised.popitem(last=False)
        return done

    def _place(self, resident: Resident, fitted: Fit) -> None:
        host = self._device.hosts.get(fitted.key) or self._host(resident, fitted)
        if host.store.free <= host.reserve:
            self._grow(host)
        rows = host.prepare(fitted)
        pairs = zip(fitted.programs, host.families, fitted.inputs, strict=True)
        resident.forms = [Form(program, family, order) for program, family, order in pairs]
        resident.host, resident.slot = host, host.store.take()
        tenant = Tenant(resident.name, tuple(host.families), **resident.terms)

        def move_in() -> Sequence[Event]:
            host.store.write(resident.slot, rows)
            return [TenantAdded(tenant)]

        self._accounts.open(resident.name)
        host.tenants += 1
        try:
            self._tell(move_in)
        except BaseException:
            self._leave(resident)
            raise
        self.residents[resident.name] = resident
        LOG.info("tenant %r is served: %s, slot %d of %d", resident.name, host, resident.slot, host.store.capacity)
        for course in host.courses:
            for width in self._widths:
                if width < 2 * host.tenants:
                    self._order(course, width)

    def _order(self, course: Course, width: int, urgent: bool = False) -> list[Future[None]]:
        """Executables of all its segments."""
        entries = [Entry(course.family, s, width) for s in range(len(course.segments))]
        return [self._foundry.order((entry,), urgent=urgent) for entry in entries]

    def _leave(self, resident: Resident) -> None:
        host = resident.host
        assert host is not None, f"tenant {resident.name!r} leaves no place"
        host.store.release(resident.slot)
        host.tenants -= 1
        self._accounts.close(resident.name)
        if not host.tenants:
            self._close(host)

    def _host(self, resident: Resident, fitted: Fit) -> Host:
        """A bank for a schema that is new here, and its narrowest executables."""
        schema = self._device.plan(fitted, self._segments, self._patience_us())
        capacity = (self._capacity or first_capacity(schema)) + reserve(schema.segments)
        lanes = LANES * max(self._widths)
        needed = capacity * schema.slot_bytes + schema.shared_bytes + pool_bytes(schema.segments, lanes)
        self._device.check_room(f"tenant {resident.name!r}, with room for {capacity} of its kind,", needed)
        prepare = Preparer(schema)
        store = Store(schema, capacity, prepare(fitted))
        families = self._device.next_families(len(schema.templates))
        host = Host(schema, prepare, store, courses_of(families, schema.segments, lanes))
        for course in host.courses:
            LOG.info("family %d of tenant %r: %s", course.family, resident.name, course.segments.why)
        self._do(lambda: self._device.admit(host))
        narrowest = [made for c in host.courses for made in self._order(c, self._widths[0], urgent=True)]
        try:
            for made in narrowest:
                made.result()
        except BaseException:
            self._close(host)
            raise
        return host

    def _patience_us(self) -> float | None:
        """What a bundle may take that the most urgent tenant finds on the device: half of what that has."""
        return min((resident.terms["slo_ns"] / 2e3 for resident in self.residents.values()), default=None)

    def _close(self, host: Host) -> None:
        """Nobody reads its bank any more."""
        self._tell(lambda: [CatalogChanged(self._device.dismiss(host))])
        self._foundry.forget(host.families)

    def _grow(self, host: Host) -> None:
        capacity = 2 * host.store.capacity
        self._device.check_room(f"room for {capacity} tenants of {host}", host.store.bytes_to_grow(capacity))
        host.store.make_ready(capacity)
        ordered = [
            self._foundry.order(entries, (capacity,) * len(entries), urgent=True)
            for entries in self._device.entries_of(host)
        ]
        for made in ordered:
            made.exception()  # one that fails is offered no more
        self._tell(lambda: [CatalogChanged(self._device.grow(host, capacity))])
        LOG.info("%s has room for %d tenants", host, capacity)

    # Orders

    def _do(self, what: Callable[[], T]) -> T:
        """On the driver's thread; returns what it returns."""
        done = Future[T]()

        def do() -> Sequence[Event]:
            try:
                done.set_result(what())
            except BaseException as e:
                done.set_exception(e)
            return ()

        self._driver.order(Order(do), done)
        return done.result()

    def _tell(self, what: Callable[[], Sequence[Event]]) -> None:
        """The same, for what the policy is to be told; returns when it was."""
        done = Future[None]()

        def do() -> Sequence[Event]:
            try:
                events = what()
            except BaseException as e:
                done.set_exception(e)
                return ()
            done.set_result(None)
            return events

        self._driver.order(Order(do), done)
        done.result()
