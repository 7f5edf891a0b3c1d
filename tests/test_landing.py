"""Bundles that are done when their launch returns: the driver hands out what they computed, and calls nobody back. Nor
does the finisher."""

import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import wait

import pytest

from coalesce.errors import DeviceError, TenantClosed, TenantFailure
from coalesce.runtime.finisher import Probe
from coalesce.runtime.observer import Observer
from coalesce.runtime.orders import Order
from coalesce.runtime.reply import Reply
from coalesce.runtime.ticket import Ending, Ticket
from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.events import CatalogChanged, Event
from tests.fake_machine import catalog_of, FakeLaunched, FakeMachine, Served, WIDTHS

pytestmark = pytest.mark.once
WIDEST = WIDTHS[-1]


class Where(Observer):
    """The threads on which results were handed out."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def ended(self, *_: object) -> None:
        self.threads.append(threading.current_thread().name)


class Sometimes(FakeMachine):
    """Every third bundle is done when its launch returns."""

    def __init__(self) -> None:
        super().__init__(takes_s=2e-5)
        self.count = itertools.count()

    def launch(self, executable: int, entries: Sequence[Sequence[Ticket]]) -> FakeLaunched:
        launched = super().launch(executable, entries)
        quick = next(self.count) % 3 == 0
        launched.is_at_hand = lambda within_s: quick
        return launched


def held(served: Served, count: int) -> tuple[threading.Event, list[Reply]]:
    """Requests that the driver does not see before the event is set."""
    go = threading.Event()

    def hold() -> Sequence[Event]:
        go.wait()
        return ()

    served.driver.inbox.put(Order(hold))
    return go, [served.submit(f"t{i % 4}", i) for i in range(count)]


def test_the_driver_hands_out_what_is_done_at_once():
    where = Where()
    with Served(FakeMachine(takes_s=2e-5, is_quick=True), observers=[where]) as served:
        go, replies = held(served, 200)
        go.set()
        assert [reply.result(10) for reply in replies] == [("result", i) for i in range(200)]
        assert served.driver.book.wait_empty(5.0)
    assert set(where.threads) == {"coalesce-driver"}
    assert served.accounts.stats().bundles == len(served.machine.launches)


@pytest.mark.parametrize("l50_s, looks", [(2e-5, True), (0.5, False)])
def test_what_is_short_is_looked_at_for_a_moment(l50_s, looks, monkeypatch):
    """As long as it takes to hand it on; others wait for what is longer. What was not done then, more than once, is
    looked at seldom."""
    if looks:  # however long this host takes for it
        monkeypatch.setattr("coalesce.runtime.launcher.SHORT_NS", 10**11)
    asked: dict[int, list[tuple[int, bool]]] = {}  # by executable: bundles, and whether they were looked at
    machine = FakeMachine(takes_s=l50_s)
    count = 40 if looks else 1

    def launch(executable: int, entries: Sequence[Sequence[Ticket]]) -> FakeLaunched:
        launched = FakeMachine.launch(machine, executable, entries)
        own, bundle = asked.setdefault(executable, []), len(machine.launches) - 1
        launched.is_at_hand = lambda within_s: bool(own.append((bundle, within_s > 0)))
        return launched

    machine.launch = launch
    with Served(machine) as served:
        for i in range(count):
            assert served.submit("t0", i).result(10) == ("result", i)
            assert served.driver.book.wait_empty(5.0)
    assert sum(map(len, asked.values())) == count
    for own in asked.values():
        assert own == [(bundle, looks and (i < 3 or bundle % 16 == 0)) for i, (bundle, _) in enumerate(own)]


def test_bundles_complete_in_their_order_whoever_waits_for_them():
    where = Where()
    with Served(Sometimes(), observers=[where]) as served:
        for _ in range(5):
            go, replies = held(served, 100)
            go.set()
            assert [reply.result(10) for reply in replies] == [("result", i) for i in range(100)]
    assert set(where.threads) == {"coalesce-driver", "coalesce-finisher"}


@pytest.mark.parametrize("is_quick", [True, False])
def test_a_callback_may_wait_for_another_request(is_quick):
    """Whoever hands out results does not wait for it."""
    got: list[object] = []
    where = Where()
    with Served(FakeMachine(takes_s=2e-5, is_quick=is_quick), observers=[where]) as served:
        go, (reply,) = held(served, 1)
        called = threading.Event()
        reply.add_done_callback(lambda own: got.append(served.submit("t1", 2).result(5)))
        reply.add_done_callback(lambda own: got.append(threading.current_thread().name))
        reply.add_done_callback(lambda own: called.set())
        go.set()
        assert called.wait(10)
    assert got == [("result", 2), "coalesce-callbacks"]
    assert where.threads == ["coalesce-driver" if is_quick else "coalesce-finisher"] * 2


def test_nor_are_those_that_come_while_the_bundle_runs(caplog):
    called: list[str] = []
    machine = FakeMachine(takes_s=2e-5, is_quick=True)

    def results(launched: FakeLaunched) -> list[list[object]]:
        reply = launched.entries[0][0].waiter
        assert isinstance(reply, Reply)
        reply.add_done_callback(lambda own: called.append(threading.current_thread().name))
        reply.add_done_callback(lambda own: 1 / 0)
        return FakeLaunched.results(launched)

    def launch(executable: int, entries: Sequence[Sequence[Ticket]]) -> FakeLaunched:
        launched = FakeMachine.launch(machine, executable, entries)
        launched.results = lambda: results(launched)
        return launched

    machine.launch = launch
    with Served(machine) as served:
        go, replies = held(served, 9)
        go.set()
        assert [reply.result(10) for reply in replies] == [("result", i) for i in range(9)]
    assert called and set(called) == {"coalesce-callbacks"}
    assert any("a callback of a request" in record.getMessage() for record in caplog.records)


def test_a_callback_waits_for_no_later_bundle():
    """One that is added while its bundle runs, which the driver hands out; the next bundle hangs meanwhile."""
    machine = FakeMachine(takes_s=2e-5)
    launched_one, is_added, called = threading.Event(), threading.Event(), threading.Event()

    def launch(executable: int, entries: Sequence[Sequence[Ticket]]) -> FakeLaunched:
        launched = FakeMachine.launch(machine, executable, entries)
        if entries[0][0].inputs[0] == "quick":
            launched.is_at_hand = lambda within_s: launched_one.set() or is_added.wait(10)
        else:
            launched.wait = lambda: None if called.wait(10) else pytest.fail("the callback waits for this bundle")
        return launched

    machine.launch = launch
    with Served(machine) as served:
        quick = served.submit("t0", "quick")
        assert launched_one.wait(10)
        quick.add_done_callback(lambda own: called.set())
        hangs = served.submit("t1", "hangs")
        is_added.set()
        assert called.wait(10)
        assert [quick.result(10), hangs.result(10)] == [("result", "quick"), ("result", "hangs")]


def test_a_callback_of_a_refused_request_may_wait_for_another():
    """The driver refuses it, and must not wait for what only the driver can serve."""
    got: list[object] = []
    called = threading.Event()
    with Served(FakeMachine(takes_s=2e-5)) as served:
        go, _ = held(served, 0)
        refused = served.submit("nobody", 1)
        refused.add_done_callback(lambda own: got.append(served.submit("t0", 2).result(5)))
        refused.add_done_callback(lambda own: got.append(threading.current_thread().name))
        refused.add_done_callback(lambda own: called.set())
        go.set()
        assert isinstance(refused.exception(10), TenantClosed)
        assert called.wait(10)  # what closes now serves nobody any more
    assert got == [("result", 2), "coalesce-callbacks"]


@pytest.mark.parametrize("count", [1, 4])
def test_what_has_landed_is_handed_out_before_an_order(count):
    """Which may take long, or wait for just that."""
    found: list[bool] = []

    with Served(FakeMachine(takes_s=2e-5, is_quick=True)) as served:
        go, replies = held(served, count)

        def order() -> Sequence[Event]:
            found.extend(reply.done() for reply in replies)
            return ()

        served.driver.inbox.put(Order(order))
        go.set()
        assert [reply.result(10) for reply in replies] == [("result", i) for i in range(count)]
    assert found[0], "it was launched before the order, and done then"


@pytest.mark.parametrize("waits", [False, True])
def test_results_wait_for_those_of_full_bundles_right_behind(waits, monkeypatch):
    """A while: else each is handed out when what follows its end is launched. A bundle with room keeps nobody waiting,
    and in the end nobody waits for anything."""
    monkeypatch.setattr("coalesce.runtime.launcher.TOGETHER_NS", 10**11 if waits else 0)
    seen: list[str] = []

    class Quick(FakeMachine):
        def launch(self, executable: int, entries: Sequence[Sequence[Ticket]]) -> FakeLaunched:
            seen.append("full" if sum(map(len, entries)) == WIDEST else "other")
            return super().launch(executable, entries)

    class Ends(Observer):
        def ended(self, endings: Sequence[Ending], now_ns: int) -> None:
            seen.append("ended")

    with Served(Quick(takes_s=2e-5, is_quick=True), observers=[Ends()]) as served:
        go, replies = held(served, 8 * WIDEST + 1)
        go.set()
        assert [reply.result(10) for reply in replies] == [("result", i) for i in range(len(replies))]
        assert served.driver.book.wait_empty(5.0)
    assert seen.count("full") == 8 and seen.count("other") == 1 and seen.count("ended") == 9
    assert seen.index("other") == 8 if waits else seen.index("ended") < 8


@pytest.mark.parametrize("is_due", [False, True])
def test_results_that_are_due_soon_are_there_before_the_next_bundle_is_launched(is_due, monkeypatch):
    """Whoever has time may be told together with who comes behind."""
    monkeypatch.setattr("coalesce.runtime.launcher.TOGETHER_NS", 10**11)
    monkeypatch.setattr("coalesce.runtime.launcher.HURRY_NS", 10**11 if is_due else 0)
    seen: list[list[bool]] = []

    class Quick(FakeMachine):
        def launch(self, executable: int, entries: Sequence[Sequence[Ticket]]) -> FakeLaunched:
            seen.append([own.waiter.done() for tickets in sent for own in tickets])
            sent.append([ticket for tickets in entries for ticket in tickets])
            return super().launch(executable, entries)

    sent: list[list[Ticket]] = []
    with Served(Quick(takes_s=2e-5, is_quick=True)) as served:
        go, replies = held(served, 4 * WIDEST)
        go.set()
        assert [reply.result(10) for reply in replies] == [("result", i) for i in range(len(replies))]
    assert len(seen) > 2 and len(seen[1]) == WIDEST
    assert all(map(all, seen)) if is_due else not any(seen[1])


def test_what_was_of_no_use_is_forgotten_with_its_executable_and_when_it_is_of_use():
    machine = FakeMachine(takes_s=2e-5)
    with Served(machine) as served:

        def known() -> set[int]:
            found = list[set[int]]()
            served.driver.carry_out(lambda: found.append(set(served.driver._launcher._vain)) or ())
            return found[0]

        for count in (1, 8):
            go, replies = held(served, count)
            go.set()
            assert wait(replies, 10).not_done == set()
        narrow, wide = sorted(known())
        left = [own for own in catalog_of(machine).executables if own.id != wide]
        served.driver.carry_out(lambda: [CatalogChanged(Catalog(tuple(left)))])
        assert known() == {narrow}
        machine.is_quick = True
        assert served.submit("t0", 1).result(10) == ("result", 1) and not known()


@pytest.mark.parametrize("is_quick", [True, False])
def test_requests_end_when_their_results_are_there(is_quick):
    at: list[tuple[str, int]] = []

    class End(Observer):
        def ended(self, endings: Sequence[Ending], now_ns: int) -> None:
            at.append(("ended", now_ns))

    class Late(FakeMachine):
        def launch(self, executable: int, entries: Sequence[Sequence[Ticket]]) -> FakeLaunched:
            launched = super().launch(executable, entries)
            launched.results = lambda: at.append(("there", time.monotonic_ns())) or FakeLaunched.results(launched)
            return launched

    with Served(Late(takes_s=2e-5, is_quick=is_quick), observers=[End()]) as served:
        assert served.submit("t0", 1).result(10) == ("result", 1)
    (first, there_ns), (second, ended_ns) = at
    assert (first, second) == ("there", "ended") and there_ns <= ended_ns


def test_a_probe_is_timed_from_its_own_launch():
    """Whatever lands on the driver while the finisher waits for the probe."""
    timed: list[int | Exception] = []
    may_end, ended = threading.Event(), threading.Event()

    class Launched(FakeLaunched):
        def wait(self) -> None:
            may_end.wait(10)

    machine = FakeMachine(takes_s=2e-5, is_quick=True)
    with Served(machine) as served:

        def done(outcome: int | Exception) -> None:
            timed.append(outcome)
            ended.set()

        served.driver.carry_out(lambda: served.driver.probe(Probe(lambda: Launched(machine, []), done)) or ())
        since_ns = time.monotonic_ns()
        time.sleep(0.02)
        assert served.submit("t0", 1).result(10) == ("result", 1)
        took_ns = time.monotonic_ns() - since_ns
        may_end.set()
        assert ended.wait(10)
    assert isinstance(timed[0], int) and timed[0] >= took_ns


@pytest.mark.parametrize("is_quick", [True, False])
def test_results_that_cannot_be_handed_out_end_everything(is_quick, monkeypatch):
    """A bug of ours: nobody waits for ever."""
    monkeypatch.setattr(FakeLaunched, "results", lambda self: [])
    with Served(FakeMachine(takes_s=2e-5, is_quick=is_quick)) as served:
        go, replies = held(served, 8)
        go.set()
        assert all(isinstance(reply.exception(10), DeviceError) for reply in replies)
        assert isinstance(served.submit("t0", 1).exception(10), DeviceError)


def test_what_fails_at_once_fails_alone():
    machine = FakeMachine(takes_s=2e-5, is_quick=True, raises=lambda value: value == 5)
    with Served(machine, tenants=8) as served:
        go, replies = held(served, 16)
        go.set()
        wait(replies, 10)
        assert isinstance(replies[5].exception(0), TenantFailure)
        assert [reply.result(0) for i, reply in enumerate(replies) if i != 5] == [
            ("result", i) for i in range(16) if i != 5
        ]


def test_a_device_that_dies_at_once_ends_everything():
    with Served(FakeMachine(takes_s=2e-5, is_quick=True, dies_of=1)) as served:
        go, replies = held(served, 32)
        go.set()
        wait(replies, 10)
        assert isinstance(replies[1].exception(0), DeviceError)
        assert served.driver.book.wait_empty(10.0)
