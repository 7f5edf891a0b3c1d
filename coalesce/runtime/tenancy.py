"""Tenants coming, changing and going, while others are served.

    add       trace -> fit -> a device, that of its family if there is one -> a place there
    update    params of the same types -> fit again -> weights
    remove    the policy is told -> its last request ends -> the place is free
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from coalesce.errors import InvalidInput, OutOfDeviceMemory, ServingError, TraceError
from coalesce.passes.pipeline import normalise
from coalesce.program import Program
from coalesce.runtime.errands import Errands
from coalesce.runtime.gil import handing_on
from coalesce.runtime.quarters import Resident
from coalesce.runtime.station import Station
from coalesce.runtime.verify import Alone, check_examples, Unlike
from coalesce.runtime.weights import check_results, check_types, types_of
from coalesce.scheduler.events import TenantRemoved
from coalesce.serving.fit import Fit, fit
from coalesce.tracing import trace

LOG = logging.getLogger("coalesce.runtime")

REMEMBERED = 64  # normalised programs


class Wanted(NamedTuple):
    """A tenant to be: see `Runtime.add_tenant`."""

    name: str
    fn: Callable[..., Any]
    params: Any
    shapes: Sequence[tuple[Any, ...]]  # of its requests
    shared: Any
    terms: dict[str, Any]
    verify: bool
    device: Any  # of JAX, that it is to live on; None: whichever


class Tenancy:
    def __init__(self, stations: Sequence[Station], errands: Errands) -> None:
        self._stations, self._errands = stations, errands
        self.residents: dict[str, Resident] = {}  # that requests are taken for
        self._names: set[str] = set()  # those, and who comes or goes
        self._homes: dict[Hashable, list[Station]] = {}  # of each schema its device, once for each of its tenants
        self._normalised: OrderedDict[int, tuple[Any, Normal]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, wanted: Wanted, wait: bool) -> Future[None]:
        """Ends when requests of it can be served; on the calling thread, if that waits anyway. To cancel it is too
        late: the tenant comes, and `remove` lets it go."""
        added = Future[None]()
        added.set_running_or_notify_cancel()

        def add() -> None:
            try:
                self._add(wanted)
            except BaseException as e:
                added.set_exception(e)
            else:
                added.set_result(None)

        if wait:
            add()
        else:
            self._errands.thread(f"add-{wanted.name}", add).start()
        return added

    def _add(self, wanted: Wanted) -> None:
        with self._lock:
            if wanted.name in self._names:
                raise InvalidInput(f"there is a tenant {wanted.name!r} already; update_tenant gives it other weights")
            self._names.add(wanted.name)
        try:
            resident = Resident(wanted.name, wanted.fn, wanted.shapes, wanted.terms)
            self._allowed(wanted)
            with handing_on():
                if wanted.verify:
                    check_examples(wanted.name, wanted.shapes, wanted.params)
                self._move_in(resident, wanted)
        except BaseException:
            with self._lock:
                self._names.discard(wanted.name)
            raise
        self.residents[wanted.name] = resident
        slots = resident.host.store.capacity
        LOG.info("tenant %r is served: %s, slot %d of %d", wanted.name, resident.host, resident.slot, slots)

    def update(self, resident: Resident, params: Any, shared: Any) -> None:
        check_types(resident.name, resident.weights, types_of(params))
        try:
            with handing_on():
                fitted = self._fit(resident, params, shared)
        except TraceError as e:
            raise InvalidInput(f"{e}; give params of the tree, shapes and dtypes that it was added with") from e
        if fitted.key != resident.host.schema.key:
            raise InvalidInput(
                f"tenant {resident.name!r}: with these params it would be another program, or share other weights;"
                " give params of the same tree, shapes and dtypes, or add it as another tenant"
            )
        check_results(resident.name, [form.out_tree for form in resident.forms], fitted.programs)
        resident.quarters.write(resident, fitted)
        LOG.info("tenant %r has other weights", resident.name)

    def remove(self, resident: Resident, drain: bool, timeout_s: float | None) -> None:
        left = Future[None]()

        def free() -> None:
            try:
                self._move_out(resident, drain)
            except BaseException as e:
                left.set_exception(e)
            else:
                LOG.info("tenant %r has left", resident.name)
                left.set_result(None)

        freeing = self._errands.thread(f"remove-{resident.name}", free)
        with self._lock:
            if self.residents.get(resident.name) is not resident:
                return  # another thread removes it, or has, and another tenant has its name
            del self.residents[resident.name]
        freeing.start()  # at once: who is interrupted before has removed nothing
        try:
            left.result(timeout_s)
        except TimeoutError:
            if left.done():
                raise  # what let it go
            late = f"tenant {resident.name!r} has not left after {timeout_s} s; it leaves when it can"
            raise TimeoutError(late) from None

    @property
    def alone(self) -> dict[str, str]:
        """Those that share no bundles with others, and why."""
        return {name: own.alone for name, own in list(self.residents.items()) if own.alone}

    def _move_in(self, resident: Resident, wanted: Wanted) -> None:
        """In company, or alone if that is what it must be."""
        fitted = self._fit(resident, wanted.params, wanted.shared)
        resident.weights = types_of(wanted.params)
        try:
            self._settle_anywhere(resident, fitted, wanted, wanted.verify)
        except Unlike as e:
            resident.alone = str(e)
            LOG.warning("tenant %r is served alone: %s", resident.name, e)
            self._settle_anywhere(resident, self._fit(resident, wanted.params, wanted.shared), wanted, False)

    def _settle_anywhere(self, resident: Resident, fitted: Fit, wanted: Wanted, verified: bool) -> None:
        """On its family's device, or where there is room."""
        full: list[Station] = []
        why: OutOfDeviceMemory | None = None
        while (station := self._home(fitted.key, wanted, full)) is not None:
            try:
                return self._settle(station, resident, fitted, wanted if verified else None)
            except OutOfDeviceMemory as e:
                why = e
            LOG.info("tenant %r does not fit %s: %s", resident.name, station.device.at, why)
            full.append(station)
            with suppress(ServingError):  # that it went is told before it comes elsewhere
                station.driver.carry_out(lambda: ())
        assert why is not None, "no device was asked"
        raise why

    def _settle(self, station: Station, resident: Resident, fitted: Fit, verified: Wanted | None) -> None:
        def check(settled: Resident) -> None:
            assert verified is not None, "nothing is to be verified"
            for i, (program, inputs) in enumerate(zip(fitted.programs, settled.shapes, strict=True)):
                alone = Alone(program, settled.fn, verified.params, inputs, station.device.make)
                for result in station.quarters.try_out(settled, i, inputs):
                    fault = alone.fault(result)
                    if fault:
                        raise Unlike(fault)

        try:
            station.quarters.take_in(resident, fitted, check if verified is not None else None)
        except BaseException:
            self._forget_home(fitted.key, station)
            raise

    def _move_out(self, resident: Resident, drain: bool) -> None:
        driver = resident.driver
        try:
            driver.carry_out(lambda: [TenantRemoved(resident.name, drain)])
            driver.book.wait_for(lambda tickets: not any(t.resident is resident for t in tickets), None)
            resident.quarters.let_go(resident)
        except ServingError:
            if driver.failure is None:  # else its device is lost, with all that it had there
                raise
        finally:
            station = next(own for own in self._stations if own.quarters is resident.quarters)
            self._forget_home(resident.host.schema.key, station)
            with self._lock:  # whoever sees that it is gone may use its name
                resident.quarters.forget(resident)
                self._names.discard(resident.name)

    def _home(self, schema: Hashable, wanted: Wanted, full: Container[Station]) -> Station | None:
        """Tenants of a schema live on one device, unless they are told where: a new one on that with the least weights.
        Where that was lost or is full, those who come later live on another. None if all are full."""
        with self._lock:
            allowed = self._allowed(wanted)
            alive = [s for s in allowed if s.driver.failure is None] or allowed
            working = [s for s in alive if s not in full]
            if not working:
                return None
            known = self._homes.setdefault(schema, [])
            station = next((s for s in known if s in working), None)
            if station is None:  # what all of them hold is not summed up for who knows where to go
                homes = [homes[-1] for homes in self._homes.values() if homes]
                station = min(working, key=lambda s: (s.device.held_bytes, homes.count(s)))
            known.append(station)
            return station

    def _allowed(self, wanted: Wanted) -> list[Station]:
        """Where a tenant may live; raises InvalidInput."""
        allowed = [s for s in self._stations if wanted.device in (None, s.device.at)]
        if not allowed:
            there = ", ".join(str(s.device.at) for s in self._stations)
            raise InvalidInput(f"tenant {wanted.name!r}: the runtime has no device {wanted.device}; it has {there}")
        return allowed

    def _forget_home(self, schema: Hashable, station: Station) -> None:
        with self._lock:
            self._homes[schema].remove(station)
            if not self._homes[schema]:
                del self._homes[schema]

    def _fit(self, resident: Resident, params: Any, shared: Any) -> Fit:
        programs = []
        for shape in resident.shapes:
            program = trace(resident.fn, params, *shape, name=resident.name, shared=shared)
            if program.abstract:
                raise InvalidInput(
                    f"tenant {resident.name!r}: params hold a ShapeDtypeStruct, which has no values; give arrays"
                )
            unreadable = next((leaf.unreadable for leaf in program.leaves if leaf.unreadable), "")
            if unreadable:
                raise InvalidInput(f"tenant {resident.name!r}: {unreadable}")
            if not resident.alone:
                program = program.with_jaxpr(*self._normalise(program))
            programs.append(program)
        fitted = fit(programs)
        return replace(fitted, key=("alone", resident.name, fitted.key)) if resident.alone else fitted

    def _normalise(self, program: Program) -> Normal:
        """Tenants with one traced function differ in weights alone: the passes run once for all of them."""
        with self._lock:
            known = self._normalised.get(id(program.jaxpr))
        if known is not None:
            return known[1]
        makers = [station.device.make for station in self._stations]
        maker = next((make for make in makers if make.serves), makers[0])
        done = maker.call(normal_form, bare(program), inlined=True)
        with self._lock:
            self._normalised[id(program.jaxpr)] = (program.jaxpr, done)
            if len(self._normalised) > REMEMBERED:
                self._normalised.popitem(last=False)
        return done


class Normal(NamedTuple):
    """A program as the passes leave it."""

    jaxpr: Any
    prepare: Any


def normal_form(program: Program) -> Normal:
    done = normalise(program).program
    return Normal(done.jaxpr, done.prepare)


def bare(program: Program) -> Program:
    """Without what is not for a pass to know: weights' values, and the tenant's own containers and kinds of keys."""
    inputs, outputs = (tuple(replace(s, key_impl=None) for s in slots) for slots in (program.inputs, program.outputs))
    return replace(program.without_values(), inputs=inputs, outputs=outputs, in_tree=None, out_tree=None)
