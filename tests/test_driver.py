"""The driver's threads, on a machine without JAX; what the policy decides is tested elsewhere."""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, wait

import pytest

from coalesce.errors import (
    DeadlineExceeded,
    DeviceError,
    OutOfDeviceMemory,
    PolicyError,
    QueueFull,
    ServingError,
    Shutdown,
    TenantClosed,
    TenantFailure,
)
from coalesce.runtime import driver, orders
from coalesce.runtime.observer import Observer
from coalesce.runtime.orders import Order
from coalesce.runtime.reports import report
from coalesce.runtime.ticket import Ticket
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command, Dispatch, Quarantine, Reason, Reject, Want
from coalesce.scheduler.events import Closed, Completed, Event, Submitted, TenantAdded, TenantRemoved, Timer
from coalesce.scheduler.request import Tenant
from tests.fake_machine import FakeLaunched, FakeMachine, Served

pytestmark = pytest.mark.once
in_segments = pytest.mark.parametrize("segments", [1, 3])


@in_segments
def test_results_go_to_whom_they_belong(segments: int):
    with Served(FakeMachine(segments=segments)) as served:
        replies = [(i, served.submit(f"t{i % 4}", i)) for i in range(200)]
        assert [reply.result(10) for _, reply in replies] == [("result", i) for i, _ in replies]
        assert served.driver.book.wait_empty(1.0)


def test_what_arrives_while_a_bundle_runs_shares_the_next_one():
    machine = FakeMachine()
    machine.go.clear()
    with Served(machine) as served:
        first = served.submit("t0", "first")
        while not machine.launches:  # it is on the device before the others come
            time.sleep(0.001)
        others = [served.submit(f"t{i % 4}", i) for i in range(16)]
        machine.go.set()
        wait([first, *others], 10)
        assert machine.launches[0] == ["first"]
        assert max(map(len, machine.launches)) == 8


class Told(Observer):
    """What the policy was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        self.events.append(event)


@pytest.mark.parametrize("failed, why", [(False, "took far longer"), (True, "its requests failed")])
def test_it_is_said_why_a_tenant_runs_alone(failed, why, caplog):
    with caplog.at_level(logging.INFO, "coalesce.runtime"):
        report(Quarantine("t0", failed), 0)
    assert [why in record.getMessage() for record in caplog.records] == [True]


def test_a_bundle_that_has_ended_is_told_before_requests_that_came_first():
    told = Told()
    machine = FakeMachine()
    machine.go.clear()
    with Served(machine, observers=[told]) as served:
        first = served.submit("t0", "first")
        while not machine.launches:
            time.sleep(0.001)
        busy, goes = threading.Event(), threading.Event()

        def hold() -> tuple[()]:
            busy.set()
            goes.wait(10)
            return ()

        served.driver.inbox.put(Order(hold))  # the driver is busy, and then finds both in its inbox
        busy.wait(10)
        second = served.submit("t1", "second")
        machine.go.set()
        first.result(10)
        goes.set()
        second.result(10)
    (ended, came) = [event for event in told.events if isinstance(event, Completed | Submitted)][1:3]
    assert isinstance(ended, Completed) and ended.followed
    assert isinstance(came, Submitted) and [request.tenant for request in came.requests] == ["t1"]


def test_what_handing_results_out_took_is_told_once_though_a_bundle_fails_after_it():
    told = Told()
    machine = FakeMachine(raises=lambda value: value == "bad")
    machine.copies = True
    with Served(machine, observers=[told]) as served:
        for value in ("good", "bad", "good", "good"):
            wait([served.submit("t0", value)], 10)
    ends = [event for event in told.events if isinstance(event, Completed)]
    assert [end.failed for end in ends] == [False, True, False, False]
    assert [end.results_ns > 0 for end in ends] == [False, True, False, True]


def test_clients_have_results_when_they_are_called_back():
    told = Told()
    machine = FakeMachine()
    machine.copies = True
    with Served(machine, observers=[told]) as served:
        late = iter([0, 3_000_000_000, 0])
        served.driver._finisher._late_ns = lambda: next(late)
        for _ in range(3):
            wait([served.submit("t0", "good")], 10)
    took_ns = [event.results_ns for event in told.events if isinstance(event, Completed)]
    assert [took > 3_000_000_000 for took in took_ns] == [False, False, True]


def test_what_runs_next_does_not_wait_for_an_order_that_comes_before_requests():
    """The driver finds in its inbox that a bundle has ended, an order that takes long, and a request, while others wait
    already."""
    told = Told()
    machine = FakeMachine()
    machine.go.clear()
    with Served(machine, observers=[told]) as served:
        replies = [served.submit(f"t{i % 4}", i) for i in range(40)]
        while not machine.launches:
            time.sleep(0.001)
        busy, goes, launched = threading.Event(), threading.Event(), list[int]()

        def hold() -> tuple[()]:
            busy.set()
            goes.wait(10)
            return ()

        def long() -> tuple[()]:
            launched.append(len(machine.launches))
            return ()

        served.driver.inbox.put(Order(hold))
        busy.wait(10)
        before = len(machine.launches)
        machine.go.set()
        assert wait([replies[i] for lanes in machine.launches for i in lanes], 10).not_done == set()
        served.driver.inbox.put(Order(long))
        replies.append(served.submit("t0", "late"))
        goes.set()
        assert wait(replies, 10).not_done == set()
    assert launched[0] > before
    assert not next(event.followed for event in told.events if isinstance(event, Completed))


@in_segments
@pytest.mark.parametrize("bad", [0, 5, 7])
def test_a_lane_that_raises_fails_alone_after_few_reruns(bad, segments: int):
    machine = FakeMachine(raises=lambda value: value == bad, segments=segments)
    machine.go.clear()
    with Served(machine, tenants=8) as served:
        hold = [served.submit("t0", "hold"), served.submit("t0", "hold")]
        while not machine.launches:
            time.sleep(0.001)
        replies = [served.submit(f"t{i}", i) for i in range(8)]
        machine.go.set()
        wait([*hold, *replies], 10)
        for i, reply in enumerate(replies):
            if i != bad:
                assert reply.result(0) == ("result", i)
        with pytest.raises(TenantFailure, match=rf"tenant 't{bad}'.*ran alone: ValueError: cannot compute {bad}"):
            replies[bad].result(0)
        runs = [own for own in machine.launches if bad in own]
        assert len(runs) <= 4  # 8 lanes, 4, 2 and 1
        assert served.accounts.stats().tenants[f"t{bad}"].failed == 1


@in_segments
def test_cancelled_requests_never_run_and_end_once(segments: int):
    machine = FakeMachine(segments=segments)
    machine.go.clear()
    with Served(machine) as served:
        running = [served.submit("t0", i) for i in range(64)]
        waiting = [reply for reply in running if reply.cancel()]
        assert all(not reply.cancel() or reply.cancelled() for reply in waiting)
        machine.go.set()
        assert served.driver.book.wait_empty(10.0)
        ran = {value for own in machine.launches for value in own}
        for i, reply in enumerate(running):
            if reply.cancelled():
                with pytest.raises(CancelledError):
                    reply.result(0)
            else:
                assert reply.result(10) == ("result", i) and i in ran
        tenant = served.accounts.stats().tenants["t0"]
        assert tenant.submitted == 64 == tenant.ok + tenant.cancelled and tenant.pending == 0
        assert tenant.cancelled >= 64 - 2 * 8  # at most two bundles were on their way


@in_segments
def test_a_deadline_that_passes_in_the_queue_is_an_error_in_time(segments: int):
    machine = FakeMachine(takes_s=0.001, segments=segments)
    machine.go.clear()
    with Served(machine) as served:
        hold = [served.submit("t0", "hold") for _ in range(24)]
        while len(machine.launches) < 2:  # no more are dispatched before one is done
            time.sleep(0.001)
        late = served.submit("t1", "late", deadline_s=0.05)
        with pytest.raises(DeadlineExceeded, match="tenant 't1', request 24: its deadline"):
            late.result(5)
        assert "late" not in [value for own in machine.launches for value in own]
        machine.go.set()
        wait(hold, 10)


def test_a_full_queue_refuses_at_once():
    machine = FakeMachine()
    machine.go.clear()
    with Served(machine, quota=4) as served:
        replies = [served.submit("t0", i) for i in range(64)]
        machine.go.set()
        wait(replies, 10)
        refused = [reply for reply in replies if isinstance(reply.exception(), QueueFull)]
        assert len(refused) >= 64 - 4 - 2 * 8
        assert "quota" in str(refused[0].exception())


class Broken(Observer):
    """It cannot take what it is told: `of` says what."""

    def __init__(self, of: str, error: BaseException) -> None:
        self.of, self.error = of, error

    def raises(self, what: str) -> None:
        if self.of == what:
            raise self.error

    def sent(self, *_):
        self.raises("sent")

    def decided(self, *_):
        self.raises("decided")

    def rejected(self, *_):
        self.raises("rejected")

    def finished(self, *_):
        self.raises("finished")

    def ended(self, *_):
        self.raises("ended")


@pytest.mark.parametrize("error", [RuntimeError(), SystemExit(3), CancelledError(), asyncio.CancelledError()], ids=repr)
def test_an_observer_that_raises_is_dropped_and_the_loop_lives(caplog, error):
    """Whichever thread it is told on, and whatever it raises."""
    broken = [Broken(of, error) for of in ("decided", "rejected", "finished", "ended")]
    machine = FakeMachine(segments=3, raises=lambda value: value == "bad")
    with Served(machine, observers=broken) as served, caplog.at_level(logging.ERROR):
        assert isinstance(served.submit("t0", "late", deadline_s=-1.0).exception(10), DeadlineExceeded)
        assert isinstance(served.submit("t0", "bad").exception(10), TenantFailure)
        assert served.submit("t0", 2).result(10) == ("result", 2)
        assert served.driver._thread.is_alive() and served.driver._finisher.thread.is_alive()
    dropped = [r.getMessage() for r in caplog.records if "is not told anything any more" in r.getMessage()]
    assert len(dropped) == 4


def test_what_ends_a_callers_thread_is_the_callers(caplog):
    """As what a signal handler raises while an observer is told there. The request is not sent."""
    broken = Broken("sent", KeyboardInterrupt())
    with Served(FakeMachine(), observers=[broken]) as served:
        with pytest.raises(KeyboardInterrupt):
            served.submit("t0", 1)
        assert not served.driver.book.tickets and not caplog.records
        broken.error = RuntimeError()
        assert served.submit("t0", 2).result(10) == ("result", 2)
        assert "is not told anything any more" in caplog.text


@in_segments
def test_a_callback_that_raises_hurts_nobody(caplog, segments: int):
    with Served(FakeMachine(segments=segments)) as served, caplog.at_level(logging.CRITICAL, "concurrent.futures"):
        reply = served.submit("t0", 1)
        reply.add_done_callback(lambda _: 1 / 0)
        assert reply.result(10) == ("result", 1)
        assert served.submit("t1", 2).result(10) == ("result", 2)


@in_segments
def test_a_device_that_hangs_ends_everything_with_an_error(segments: int):
    machine = FakeMachine(segments=segments)
    machine.go.clear()
    served = Served(machine, hang_s=0.2)
    replies = [served.submit("t0", i) for i in range(20)]
    wait(replies, 10)
    errors = [reply.exception(0) for reply in replies]
    assert all(isinstance(error, DeviceError) for error in errors)
    assert len(set(map(id, errors))) == 20, "one that is raised by all of them keeps what each had"
    assert str(errors[3]).startswith("tenant 't0', request 3: a bundle is on the device for 0.2 s")
    assert isinstance(served.driver.failure, DeviceError)
    later = served.submit("t0", "later")
    assert isinstance(later.exception(10), DeviceError)
    assert tallied(served) == [(21, 21, 0)]
    machine.go.set()
    served.driver.stop()


@in_segments
def test_removing_a_tenant_without_drain_ends_what_waits(segments: int):
    machine = FakeMachine(segments=segments)
    machine.go.clear()
    with Served(machine) as served:
        replies = [served.submit("t0", i) for i in range(64)]
        served.driver.inbox.put(TenantRemoved("t0", drain=False))
        other = served.submit("t1", "other")
        machine.go.set()
        wait([*replies, other], 10)
        assert other.result(0) == ("result", "other")
        errors = [reply.exception(0) for reply in replies]
        assert sum(isinstance(e, TenantClosed) for e in errors) >= 64 - 2 * 8
        assert all(e is None or isinstance(e, TenantClosed) for e in errors)


@in_segments
def test_closing_with_drain_serves_what_waits_and_takes_no_more(segments: int):
    machine = FakeMachine(segments=segments)
    machine.go.clear()
    with Served(machine) as served:
        replies = [served.submit("t0", i) for i in range(40)]
        served.driver.inbox.put(Closed(drain=True))
        refused = served.submit("t0", "refused")
        machine.go.set()
        wait([*replies, refused], 10)
        assert [reply.result(0) for reply in replies] == [("result", i) for i in range(40)]
        assert isinstance(refused.exception(0), Shutdown)


def test_what_is_sent_after_the_end_ends_too():
    served = Served(FakeMachine())
    served.driver.stop()
    assert isinstance(served.submit("t0", 1).exception(10), Shutdown)


class Buggy(Coalescing):
    """Fails when it is told of the tenth bundle."""

    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        if isinstance(event, Completed) and event.bundle == 9:
            raise ZeroDivisionError
        return super().on_event(event, now_ns)


def test_a_bug_in_the_policy_leaves_nobody_waiting(caplog):
    machine = FakeMachine()
    with caplog.at_level(logging.CRITICAL, "coalesce.runtime"), Served(machine, policy=Buggy()) as served:
        replies = [served.submit(f"t{i % 4}", i) for i in range(200)]
        errors = [reply.exception(10) for reply in replies]
        assert {type(e) for e in errors} == {type(None), DeviceError}
        assert "driver failed" in str(errors[-1]) and len(machine.launches) <= 11
        assert isinstance(served.submit("t0", 1).exception(10), DeviceError)
        assert not served.driver.book.tickets


class Dead(Coalescing):
    """Fails upon the first requests."""

    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        if isinstance(event, Submitted):
            raise ZeroDivisionError
        return super().on_event(event, now_ns)


def tallied(served: Served) -> list[tuple[int, int, int]]:
    """Of each tenant that was asked: how many requests came, failed with the device, and are on their way."""
    every = served.accounts.stats().tenants.values()
    return [(own.submitted, own.rejected[Reason.DEVICE], own.pending) for own in every if own.submitted]


def test_requests_that_end_before_the_policy_knows_them_count(caplog):
    """All of a turn, of which the policy fails upon the first, and those that come later."""
    with Served(FakeMachine(), policy=Dead()) as served, caplog.at_level(logging.CRITICAL, "coalesce.runtime"):
        busy, goes = threading.Event(), threading.Event()

        def hold() -> tuple[()]:
            busy.set()
            goes.wait(10)
            return ()

        served.driver.inbox.put(Order(hold))
        busy.wait(10)
        replies = [served.submit("t0", 1)]
        served.driver.inbox.put(Timer())
        replies += [served.submit(name, 1) for name in ("t0", "t1")]
        goes.set()
        wait(replies, 10)
        assert all(isinstance(reply.exception(0), DeviceError) for reply in replies)
        assert tallied(served) == [(2, 2, 0), (1, 1, 0)]
        served.submit("t1", 2).exception(10)
        assert tallied(served) == [(2, 2, 0), (2, 2, 0)]


class Refusing(Coalescing):
    """Refuses requests of `t1` together with the next bundle, and then wants something."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = list[int]()

    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        if isinstance(event, Submitted):
            self.refused += [request.id for request in event.requests if request.tenant == "t1"]
            event = Submitted(tuple(request for request in event.requests if request.tenant != "t1"))
        commands = super().on_event(event, now_ns)
        if not any(isinstance(command, Dispatch) for command in commands):
            return commands
        return [*(Reject(number, Reason.QUEUE_FULL) for number in self.refused), *commands, Want(())]


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "raises"])
def test_who_is_refused_is_told_though_what_is_done_with_it_hangs_or_raises(hangs: bool, caplog, monkeypatch):
    monkeypatch.setattr(driver, "JOIN_S", 0.1)  # of a thread that hangs until the end of this test
    stuck = threading.Event()

    def wants(want: Want) -> None:
        if hangs:
            stuck.wait()
        raise ZeroDivisionError

    served = Served(FakeMachine(), policy=Refusing(), hang_s=0.2)
    served.maker.want = wants
    with caplog.at_level(logging.CRITICAL, "coalesce.runtime"):
        replies = [served.submit("t1", 1), served.submit("t0", 0)]
        assert not wait(replies, 10).not_done
        assert isinstance(replies[0].exception(0), DeviceError)
        served.driver.stop()
        stuck.set()


def test_a_bug_in_what_is_done_between_bundles_leaves_nobody_waiting(caplog):
    with Served(FakeMachine()) as served, caplog.at_level(logging.CRITICAL, "coalesce.runtime"):

        def broken() -> list[Event]:
            raise ZeroDivisionError

        served.driver.inbox.put(Order(broken))
        reply = served.submit("t0", 1)
        assert isinstance(reply.exception(10), DeviceError)


def test_coroutines_of_one_loop_are_told_by_one_call(monkeypatch):
    machine = FakeMachine()
    machine.go.clear()
    calls: list[int] = []

    async def main(served: Served) -> list[object]:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda f, *a: (calls.append(len(a[0])), wake(f, *a)))
        waiters = []
        for i in range(17):
            reply = served.submit(f"t{i % 4}", i)
            ticket = served.driver.book.tickets[reply.request]
            ticket.waiter, ticket.loop = loop.create_future(), loop
            waiters.append(ticket.waiter)
        machine.go.set()
        return await asyncio.wait_for(asyncio.gather(*waiters), 10)

    with Served(machine) as served:
        assert asyncio.run(main(served)) == [("result", i) for i in range(17)]
    assert sum(calls) == 17 and len(calls) <= len(machine.launches)


def test_explain_tells_the_way_of_a_request():
    with Served(FakeMachine()) as served:
        reply = served.submit("t2", 1)
        reply.result(10)
        assert served.driver.book.wait_empty(5.0)
        text = served.history.explain(reply.request)
    assert text is not None
    lines = text.splitlines()
    assert lines[0] == "request 0 of tenant 't2': deadline 60000.000 ms after submit"
    assert lines[1].startswith("  bundle 0 (family 0 x1) with 1 lane") and "expected" in lines[1]
    assert lines[2].startswith("  ended after ") and lines[2].endswith(": ok")


def test_explain_tells_how_far_a_request_has_come():
    machine = FakeMachine()
    machine.go.clear()
    with Served(machine) as served:
        ahead, behind = served.submit("t0", 1), served.submit("t0", 2)
        while not machine.launches:
            time.sleep(0.001)
        tickets, now_ns = served.driver.book.tickets, time.monotonic_ns()
        held = list(tickets.values())
        texts = [served.history.explain(own.request, tickets.get(own.request), now_ns) for own in (ahead, behind)]
        machine.go.set()
        assert [ahead.result(10), behind.result(10)]
    for reply, text in zip((ahead, behind), texts, strict=True):
        assert text is not None and text.startswith(f"request {reply.request} of tenant 't0': deadline ")
    ends = [text.splitlines()[-1] for text in texts if text is not None]
    assert ends[0].endswith(" it is in bundle 0, which has not ended")
    assert any(ends[1].endswith(end) for end in (" it waits", " which has not ended"))
    (ticket,) = [own for own in held if own.request.id == ahead.request]
    served.history._lots.clear()  # as between the end of a bundle and that of its requests
    text = served.history.explain(ahead.request, ticket, now_ns)
    assert text is not None and "bundle 0 has ended: " in text.splitlines()[-1]
    assert served.history.explain(99) is None


def test_every_reason_is_a_typed_error_with_codes():
    served = Served(FakeMachine())
    with served:
        served.submit("t0", 1).result(10)
        unknown = served.submit("nobody", 1)
        error = unknown.exception(10)
    assert isinstance(error, TenantClosed) and (error.grpc, error.http) == ("NOT_FOUND", 404)
    assert all(isinstance(kind("x"), ServingError) for kind in (QueueFull, DeadlineExceeded, DeviceError, Shutdown))
    assert served.accounts.stats().tenants["t0"].rejected == {} and Reason.UNKNOWN_TENANT.value


def test_many_threads_submit_and_each_request_ends_once():
    machine = FakeMachine(takes_s=0.0002)
    with Served(machine, tenants=16, quota=100_000) as served:
        wrong: list[object] = []

        def client(k: int) -> None:
            for i in range(100):
                reply = served.submit(f"t{k}", (k, i))
                if i % 7 == 3:
                    reply.cancel()
                elif reply.result(20) != ("result", (k, i)):
                    wrong.append((k, i))

        threads = [threading.Thread(target=client, args=(k,)) for k in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert served.driver.book.wait_empty(10.0)
        stats = served.accounts.stats()
    assert not wrong
    assert sum(t.submitted for t in stats.tenants.values()) == 1600
    assert sum(t.ok + t.late + t.cancelled for t in stats.tenants.values()) == 1600
    values = [value for own in machine.launches for value in own]
    assert len(values) == len(set(values))


def test_a_device_that_keeps_the_driver_waiting_ends_everything_and_the_end_is_not_kept_waiting(monkeypatch):
    monkeypatch.setattr(driver, "JOIN_S", 0.1)  # of a thread that hangs until the end of this test
    machine = FakeMachine()
    stuck = threading.Event()

    def launch(executable: int, entries: Sequence[Sequence[Ticket]]) -> FakeLaunched:
        stuck.wait()
        return FakeMachine.launch(machine, executable, entries)

    machine.launch = launch
    served = Served(machine, hang_s=0.2)
    replies = [served.submit("t0", i) for i in range(4)]
    wait(replies, 10)
    assert all(isinstance(reply.exception(0), DeviceError) for reply in replies)
    with pytest.raises(DeviceError):
        served.driver.carry_out(lambda: ())
    served.driver.stop()
    stuck.set()


def test_a_policy_that_does_not_answer_is_no_device_that_hangs():
    is_asked, answer = threading.Event(), threading.Event()

    class Slow(Coalescing):
        def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
            if isinstance(event, Submitted):
                is_asked.set()
                answer.wait()
            return super().on_event(event, now_ns)

    with Served(FakeMachine(), policy=Slow()) as served:
        own, hang_ns = served.driver, served.driver._hang_ns
        own._watchdog.stop()  # this test looks instead
        reply = served.submit("t0", 1)
        assert is_asked.wait(10) and own._overdue() is None
        own._hang_ns = 0
        error = own._overdue()
        own._hang_ns = hang_ns
        answer.set()
        assert reply.result(10) == ("result", 1)
    assert isinstance(error, PolicyError) and "the policy has not answered for 0 s" in str(error)


def test_without_memory_the_wide_executable_is_reported_and_its_lanes_run_in_halves():
    machine = FakeMachine(most_lanes=2)
    machine.go.clear()
    with Served(machine, tenants=8) as served:
        hold = [served.submit("t0", "hold"), served.submit("t0", "hold")]
        while not machine.launches:
            time.sleep(0.001)
        replies = [served.submit(f"t{i}", i) for i in range(8)]
        machine.go.set()
        assert [reply.result(10) for reply in [*hold, *replies]][2:] == [("result", i) for i in range(8)]
        assert set(served.maker.without_memory) <= {2, 3} and served.maker.without_memory


def test_without_memory_for_one_lane_the_error_says_so():
    with Served(FakeMachine(most_lanes=0)) as served:
        error = served.submit("t0", 1).exception(10)
    assert isinstance(error, OutOfDeviceMemory) and error.http == 507


def test_a_device_that_fails_ends_everything():
    machine = FakeMachine(dies_of=3)
    with Served(machine) as served:
        assert served.submit("t0", 1).result(10) == ("result", 1)
        assert isinstance(served.submit("t0", 3).exception(10), DeviceError)
        assert isinstance(served.submit("t1", 1).exception(10), DeviceError)
        assert served.driver.book.wait_empty(10.0)
        tenants = served.accounts.stats().tenants
    assert all(t.pending == 0 for t in tenants.values())


def test_whoever_ordered_something_goes_on_when_observers_know_of_it():
    order, seen = list[str](), TenantAdded(Tenant("new", (0,), 10**9))

    class Slow(Observer):
        def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
            if event is seen:
                time.sleep(0.01)
                order.append("observed")

    with Served(FakeMachine(), observers=[Slow()]) as served:
        served.driver.carry_out(lambda: [seen])
        order.append("went on")
    assert order == ["observed", "went on"]


def test_orders_that_come_with_the_end_are_carried_out():
    served = Served(FakeMachine())
    done: list[int] = []

    def order() -> None:
        try:
            served.driver.carry_out(lambda: done.append(1) or ())
        except Shutdown:
            done.append(1)

    threads = [threading.Thread(target=order) for _ in range(8)]
    for thread in threads:
        thread.start()
    served.driver.stop()
    for thread in threads:
        thread.join(10)
    assert len(done) == 8


def test_who_is_interrupted_waits_for_what_was_ordered(monkeypatch):
    """Else a slot that is given back would be written to."""
    waited_for, done = threading.Event(), list[int]()

    class Interrupted(orders.Outcome):
        times = 0

        def wait(self) -> None:
            self.times += 1
            if self.times == 1:
                raise KeyboardInterrupt
            waited_for.set()
            super().wait()

    def put(order: Order) -> None:
        threading.Thread(target=lambda: waited_for.wait(10) and (order.do(), order.told())).start()

    monkeypatch.setattr(orders, "Outcome", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        orders.Orders().carry_out(put, lambda: done.append(1) or ())
    assert done == [1]
