"""Launching where the host takes a while for it: the next bundle is decided by as much earlier."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import wait

import pytest

from coalesce.errors import TenantClosed, TenantFailure
from coalesce.runtime.elsewhere import Elsewhere
from coalesce.runtime.observer import Observer
from coalesce.runtime.ticket import Ticket
from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command, Dispatch, WakeAt
from coalesce.scheduler.events import CatalogChanged, Completed, Event, Submitted, TenantAdded, Timer
from coalesce.scheduler.request import Request, Tenant
from tests.fake_machine import FakeLaunched, FakeMachine, Served

pytestmark = pytest.mark.once
MS = 1_000_000


class Slow(FakeMachine):
    """The host takes `launch_s` to bring it a bundle, and can be held at it; `at_work` says whether it is."""

    copies = True

    def __init__(self, launch_s: float = 0.0) -> None:
        super().__init__(takes_s=0.0005)
        self.launch_s, self.at_work, self.threads = launch_s, False, set[str]()
        self.may_launch = threading.Event()
        self.may_launch.set()

    def launch(self, executable: int, entries: Sequence[Sequence[Ticket]]) -> FakeLaunched:
        self.threads.add(threading.current_thread().name)
        self.at_work = True
        self.may_launch.wait()
        time.sleep(self.launch_s)
        self.at_work = False
        if any(ticket.inputs[0] == "broken" for tickets in entries for ticket in tickets):
            raise ValueError("nobody can stage that")
        return super().launch(executable, entries)


@pytest.fixture
def elsewhere():
    policy = Elsewhere()
    yield policy
    policy.close()


def test_with_a_policy_elsewhere_the_driver_decides_while_a_bundle_is_launched(elsewhere):
    machine = Slow()
    machine.may_launch.clear()
    with Served(machine, policy=elsewhere) as served:
        reply = served.submit("t0", 1)
        while not machine.at_work:
            time.sleep(0.001)
        assert isinstance(served.submit("nobody", 2).exception(10), TenantClosed)
        assert not reply.done()
        machine.may_launch.set()
        assert reply.result(10) == ("result", 1)
    assert machine.threads == {"coalesce-launcher"}


def test_orders_find_everything_launched_that_was_decided(elsewhere):
    machine = Slow(launch_s=0.002)
    found: list[tuple[bool, int, int]] = []
    dispatched: list[int] = []

    class Count(Observer):
        def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
            dispatched.extend(c.bundle for c in commands if isinstance(c, Dispatch))

    def look() -> Sequence[Event]:
        found.append((machine.at_work, len(dispatched), len(machine.launches)))
        return ()

    with Served(machine, observers=[Count()], policy=elsewhere) as served:
        replies = []
        for i in range(60):
            replies.append(served.submit(f"t{i % 4}", i))
            if i % 10 == 5:
                served.driver.carry_out(look)
        assert [reply.result(10) for reply in replies] == [("result", i) for i in range(60)]
    assert len(found) == 6 and found[-1][1] > 0
    assert all(not at_work and decided == launched for at_work, decided, launched in found)


@pytest.mark.parametrize("apart", [False, True])
def test_what_cannot_be_launched_fails_alone(apart, elsewhere):
    with Served(Slow(), tenants=8, policy=elsewhere if apart else None) as served:
        replies = [served.submit(f"t{i}", "broken" if i == 3 else i) for i in range(8)]
        wait(replies, 10)
        with pytest.raises(TenantFailure, match="nobody can stage that"):
            replies[3].result(0)
        assert [reply.result(0) for i, reply in enumerate(replies) if i != 3] == [
            ("result", i) for i in range(8) if i != 3
        ]


def test_the_policy_is_told_what_the_host_takes():
    told: list[Completed] = []

    class Watch(Observer):
        def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
            if isinstance(event, Completed):
                told.append(event)

    with Served(Slow(launch_s=0.003), observers=[Watch()]) as served:
        assert served.submit("t0", 1).result(10) == ("result", 1)
    with Served(FakeMachine(), observers=[Watch()]) as served:
        assert served.submit("t0", 1).result(10) == ("result", 1)
    brought, at_once = told
    assert brought.host_ns >= 3 * MS and at_once.host_ns == 0
    assert brought.start_ns + brought.host_ns == brought.brought_ns == brought.end_ns - brought.device_ns
    assert at_once.brought_ns <= at_once.start_ns and at_once.device_ns == at_once.end_ns - at_once.start_ns


@pytest.mark.parametrize("host_ms", [0, 1])
def test_the_next_bundle_is_decided_as_early_as_the_host_needs(host_ms):
    policy = Coalescing(lead_ns=MS // 5)
    policy.on_event(CatalogChanged(Catalog((Executable(0, (Entry(0, 0, 1),), 10 * MS, 11 * MS),))), 0)
    policy.on_event(TenantAdded(Tenant("a", (0,), 1000 * MS)), 0)
    now_ns = 0
    for i in range(3):
        policy.on_event(Submitted((Request(i, "a", 0, now_ns, now_ns + 1000 * MS),)), now_ns)
        now_ns += 10 * MS
        policy.on_event(Completed(i, now_ns - 10 * MS, now_ns, False, host_ms * MS), now_ns)
    both = tuple(Request(i, "a", 0, now_ns, now_ns + 1000 * MS) for i in (3, 4))
    commands = policy.on_event(Submitted(both), now_ns)
    assert sum(isinstance(c, Dispatch) for c in commands) == 1
    (wake,) = (c for c in commands if isinstance(c, WakeAt))
    assert wake.time_ns == now_ns + 10 * MS - MS // 5 - host_ms * MS
    assert not any(isinstance(c, Dispatch) for c in policy.on_event(Timer(), wake.time_ns - 1))
    assert any(isinstance(c, Dispatch) for c in policy.on_event(Timer(), wake.time_ns))
