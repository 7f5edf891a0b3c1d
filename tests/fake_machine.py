"""A device without JAX, for tests of the driver: bundles take a while, and the lanes that are told to, raise."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from coalesce.errors import DeviceError, OutOfDeviceMemory
from coalesce.runtime.accounts import Accounts
from coalesce.runtime.driver import Driver
from coalesce.runtime.history import History
from coalesce.runtime.observer import Observer, Observers
from coalesce.runtime.orders import Order
from coalesce.runtime.reply import Reply
from coalesce.runtime.ticket import Ticket
from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Want
from coalesce.scheduler.events import CatalogChanged, Event, TenantAdded, TenantRemoved
from coalesce.scheduler.policy import Policy
from coalesce.scheduler.request import Request, Tenant
from tests.checked import Checked

WIDTHS = (1, 2, 4, 8)
SLOTS = 20  # lanes that may be between two segments


class FakeLaunched:
    def __init__(self, machine: FakeMachine, entries: Sequence[Sequence[Ticket]], is_last: bool = True) -> None:
        self.machine, self.entries, self.is_last = machine, entries, is_last

    def wait(self) -> None:
        self.machine.go.wait()
        time.sleep(self.machine.takes_s / self.machine.segments)
        if sum(map(len, self.entries)) > self.machine.most_lanes:
            raise OutOfDeviceMemory(f"no room for more than {self.machine.most_lanes} lanes")
        for tickets in self.entries:
            for ticket in tickets:
                if ticket.inputs[0] == self.machine.dies_of:
                    raise DeviceError("it is dead")
                if self.machine.raises(ticket.inputs[0]):
                    raise ValueError(f"cannot compute {ticket.inputs[0]!r}")

    def is_at_hand(self, within_s: float) -> bool:
        return self.machine.is_quick

    def results(self) -> list[Any]:
        if not self.is_last:
            return [None for _ in self.entries]
        return [[("result", ticket.inputs[0]) for ticket in tickets] for tickets in self.entries]


class FakeMachine:
    """`launches` has the inputs of the lanes of each bundle; `go` can be cleared to hold bundles on the device."""

    copies = False

    def __init__(
        self,
        takes_s: float = 0.0005,
        raises: Callable[[Any], bool] = lambda value: False,
        most_lanes: int = 1000,  # that there is memory for
        dies_of: Any = None,
        is_quick: bool = False,  # bundles are done when their launch returns
        segments: int = 1,  # of the program, which takes no longer for it
    ) -> None:
        self.takes_s, self.raises, self.most_lanes, self.dies_of = takes_s, raises, most_lanes, dies_of
        self.is_quick, self.segments = is_quick, segments
        self.launches: list[list[Any]] = []
        self.released: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def launch(self, executable: int, entries: Sequence[Sequence[Ticket]]) -> FakeLaunched:
        self.launches.append([ticket.inputs[0] for tickets in entries for ticket in tickets])
        return FakeLaunched(self, entries, executable // len(WIDTHS) == self.segments - 1)

    def release(self, tickets: Sequence[Ticket]) -> None:
        self.released += [ticket.request.id for ticket in tickets]


def catalog_of(machine: FakeMachine) -> Catalog:
    took_ns = round(machine.takes_s * 1e9) // machine.segments
    places = [Entry(0, segment, width) for segment in range(machine.segments) for width in WIDTHS]
    made = tuple(Executable(i, (entry,), took_ns, 2 * took_ns) for i, entry in enumerate(places))
    return Catalog(made) if machine.segments == 1 else Catalog(made, {0: machine.segments}, {0: SLOTS})


class NoMaker:
    """Makes nothing."""

    def __init__(self) -> None:
        self.without_memory: list[int] = []

    def give_up(self, why: Exception) -> None:
        pass

    def want(self, want: Want) -> None:
        pass

    def exhausted(self, executable: int, error: Exception) -> Sequence[Event]:
        self.without_memory.append(executable)
        return ()


class Served:
    """A driver with tenants "t0", "t1", ... of one family on a fake machine."""

    def __init__(
        self,
        machine: FakeMachine,
        tenants: int = 4,
        slo_s: float = 60.0,  # generous: a host that is slow refuses nobody
        quota: int = 1000,
        hang_s: float = 30.0,
        observers: Sequence[Observer] = (),
        policy: Policy | None = None,
    ) -> None:
        self.machine = machine
        self.maker = NoMaker()
        self.accounts = Accounts()
        self.history = History()
        self.checked = Checked()
        watchers = Observers([self.accounts, self.history, self.checked, *observers])
        self.driver = Driver(policy or Coalescing(), machine, watchers, time.monotonic_ns, self.maker, hang_s)
        self.slo_ns, self.ids, self.sending = round(slo_s * 1e9), itertools.count(), threading.RLock()
        catalog = catalog_of(machine)
        added = [TenantAdded(Tenant(f"t{i}", (0,), self.slo_ns, quota=quota)) for i in range(tenants)]
        for event in added:
            self.accounts.open(event.tenant.name)
        self.driver.inbox.put(Order(lambda: [CatalogChanged(catalog), *added]))
        self.driver.start()

    def submit(self, tenant: str, value: Any, deadline_s: float | None = None) -> Reply:
        allowed_ns = self.slo_ns if deadline_s is None else round(deadline_s * 1e9)
        with self.sending:
            number, now_ns = next(self.ids), time.monotonic_ns()
            reply = Reply(number, self.driver)
            request = Request(number, tenant, 0, now_ns, now_ns + allowed_ns)
            self.driver.send(Ticket(request, None, None, [value], reply))
        return reply

    def leaving(self, tenant: str, drain: bool) -> TenantRemoved:
        return TenantRemoved(tenant, drain)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.machine.go.set()
        self.driver.stop()
        if kind is None and self.driver.failure is None:
            violations = self.checked.violations()
            assert not violations, violations[:3]
