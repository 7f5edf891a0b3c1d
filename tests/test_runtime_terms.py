"""What tenants and requests are promised, from the call to what becomes of it: priorities, weights, quotas, ends.

The device can be held, so that it is known what waits behind the bundles that it has.
"""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from coalesce.errors import DeviceError, QueueFull, Shutdown
from coalesce.runtime import watchdog
from coalesce.runtime.bundle import Bundle
from coalesce.runtime.observer import Observer
from coalesce.runtime.reply import Reply
from coalesce.scheduler.commands import Command, Dispatch
from coalesce.scheduler.events import Event, TenantAdded
from coalesce.scheduler.request import Tenant
from tests.checked import checked_runtime

SLO = 120.0


def vector(value: float) -> np.ndarray:
    return np.full(4, value, np.float32)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Bundles end while it is set."""
    gate, right, is_at_hand = threading.Event(), Bundle.wait, Bundle.is_at_hand
    gate.set()

    def wait(self: Bundle) -> None:
        gate.wait(60)
        right(self)

    monkeypatch.setattr(Bundle, "wait", wait)
    monkeypatch.setattr(Bundle, "is_at_hand", lambda self, within_s: gate.is_set() and is_at_hand(self, within_s))
    yield gate
    gate.set()


def add(w: Any, x: Any) -> Any:
    return w + x


class Order(Observer):
    """By whom requests ended, one after another; and which tenants the policy was told of."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.tenants: dict[str, Tenant] = {}
        self.dispatched = 0

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        if isinstance(event, TenantAdded):
            self.tenants[event.tenant.name] = event.tenant
        self.dispatched += sum(isinstance(command, Dispatch) for command in commands)

    def ended(self, endings: Any, now_ns: int) -> None:
        self.names += (ending.ticket.request.tenant for ending in endings)


def test_priorities_of_tenants_and_requests_add_up(gate):
    """Larger goes first; what the device has already goes before."""
    order = Order()
    with checked_runtime([order], widths=(1,), compiled=False) as rt:
        for name, priority in (("first", 0), ("low", 0), ("high", 1), ("told", 0)):
            rt.add_tenant(name, add, vector(1), example=(vector(0),), slo=SLO, priority=priority)

        async def main() -> None:
            gate.clear()
            order.dispatched = 0
            begun = [rt.submit("first", vector(0)) for _ in range(2)]
            while order.dispatched < 2:
                await asyncio.sleep(0.001)
            waiting = [rt.submit(name, vector(i)) for i in range(4) for name in ("low", "high")]
            urgent = [rt.submit("low", vector(0), priority=2)]
            told = [asyncio.ensure_future(rt.infer("told", vector(i), priority=3)) for i in range(2)]
            await asyncio.sleep(0)  # both are sent
            gate.set()
            await asyncio.gather(*told)
            for reply in [*begun, *waiting, *urgent]:
                reply.result(60)

        asyncio.run(main())
    after = [name for name in order.names if name != "first"]
    assert after == ["told"] * 2 + ["low"] + ["high"] * 4 + ["low"] * 4


def test_weight_and_the_other_terms_are_the_policys():
    order = Order()
    with checked_runtime([order], widths=(1,), compiled=False) as rt:
        rt.add_tenant("t", add, vector(1), example=(vector(0),), slo=2.5, weight=4.0, quota=7, priority=-1)
        rt.add_tenant("usual", add, vector(2), example=(vector(0),), slo=SLO)
        np.testing.assert_array_equal(rt.submit("t", vector(1), deadline=SLO).result(60), vector(2))
    own, usual = order.tenants["t"], order.tenants["usual"]
    assert (own.weight, own.slo_ns, own.quota, own.priority) == (4.0, 2_500_000_000, 7, -1)
    assert (usual.weight, usual.quota, usual.priority) == (1.0, 1024, 0)


def test_a_tenant_above_its_quota_is_refused_and_others_are_not(gate):
    with checked_runtime(widths=(1,), compiled=False) as rt:
        for name, quota in (("small", 3), ("large", 1000)):
            rt.add_tenant(name, add, vector(1), example=(vector(0),), slo=SLO, quota=quota)
        gate.clear()
        replies = [rt.submit(name, vector(i)) for i in range(30) for name in ("small", "large")]
        last = replies[-2]
        assert isinstance(last.exception(60), QueueFull)  # at once: nothing of the others has run
        gate.set()
        errors = [reply.exception(60) for reply in replies]
        refused = [e for e in errors[::2] if e is not None]
        assert 30 - 3 - 3 <= len(refused) <= 30 - 3 and errors[1::2] == [None] * 30
        assert all(isinstance(e, QueueFull) and (e.grpc, e.http) == ("RESOURCE_EXHAUSTED", 429) for e in refused)


def test_closing_without_drain_ends_what_waits(gate):
    with checked_runtime(widths=(1,), compiled=False) as rt:
        rt.add_tenant("t", add, vector(1), example=(vector(0),), slo=SLO)
        gate.clear()
        replies: list[Reply] = [rt.submit("t", vector(i)) for i in range(20)]
        closing = threading.Thread(target=rt.close, kwargs={"drain": False})
        closing.start()
        assert isinstance(replies[-1].exception(60), Shutdown)  # while the device is still at the first
        gate.set()
        closing.join(60)
        errors = [reply.exception(60) for reply in replies]
        served = [i for i, e in enumerate(errors) if e is None]
        assert len(served) <= 3 and served == list(range(len(served)))
        assert all(e is None or isinstance(e, Shutdown) for e in errors)
        for i in served:
            np.testing.assert_array_equal(replies[i].result(0), vector(1 + i))
        assert rt.health().status == "closed"


def test_a_bundle_that_takes_longer_than_hang_s_is_a_device_that_hangs(gate, monkeypatch):
    monkeypatch.setattr(watchdog, "MOST_S", 0.05)  # it would look every 2.5 s
    gone_ns = [0]  # by how much the clock is ahead: a host that is slow is no device that hangs

    with checked_runtime(
        widths=(1,), compiled=False, hang_s=20.0, clock=lambda: time.monotonic_ns() + gone_ns[0]
    ) as rt:
        rt.add_tenant("t", add, vector(1), example=(vector(0),), slo=SLO)
        rt.submit("t", vector(1)).result(60)
        gate.clear()
        replies = [rt.submit("t", vector(i)) for i in range(5)]
        while not rt._stations[0].driver._launcher._aloft:
            time.sleep(0.001)
        gone_ns[0] = 21 * 10**9
        errors = [reply.exception(60) for reply in replies]
        assert all(isinstance(e, DeviceError) and "for 20 s; it hangs" in str(e) for e in errors)
        assert rt.health().status == "failed" and not rt.health().ok
        with pytest.raises(DeviceError):
            rt.submit("t", vector(1))
        gate.set()


def test_a_tenant_that_does_not_leave_in_time_leaves_when_it_can(gate):
    with checked_runtime(widths=(1,), compiled=False) as rt:
        rt.add_tenant("t", add, vector(1), example=(vector(0),), slo=SLO)
        gate.clear()
        reply = rt.submit("t", vector(1))
        with pytest.raises(TimeoutError, match="tenant 't' has not left after 0.01 s"):
            rt.remove_tenant("t", timeout=0.01)
        gate.set()
        np.testing.assert_array_equal(reply.result(60), vector(2))
        while "t" in rt.stats().tenants:
            threading.Event().wait(0.001)
        rt.add_tenant("t", add, vector(2), example=(vector(0),), slo=SLO)
