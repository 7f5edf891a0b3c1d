"""Users' callbacks of requests, and who waits for them: a driver on a machine without JAX."""

import asyncio
import threading
import weakref
from concurrent.futures import Future
from typing import Any

import pytest

from coalesce.errors import Shutdown
from coalesce.runtime import callbacks
from coalesce.runtime.orders import Stop
from coalesce.runtime.station import wait_ended
from tests.fake_machine import FakeMachine, Served

pytestmark = pytest.mark.once


def held() -> Served:
    """Its requests end once `machine.go` is set, after their callbacks were added."""
    machine = FakeMachine(takes_s=2e-5)
    machine.go.clear()
    return Served(machine)


def test_where_nothing_is_due_nobody_waits():
    with held() as served:
        called = threading.Event()
        served.submit("t0", 1).add_done_callback(lambda own: called.set())
        served.machine.go.set()
        assert called.wait(10) and served.driver.callbacks.wait_called(10.0)
        assert all(served.driver.callbacks.wait_called(0.0) for _ in range(200))


def test_whoever_waits_waits_for_all_that_are_due():
    over, found = threading.Event(), list[bool]()
    with held() as served:
        drivers = [served.driver]
        reply = served.submit("t0", 1)
        reply.add_done_callback(lambda own: over.wait(10))
        reply.add_done_callback(lambda own: found.append(wait_ended(drivers, None)))  # not for itself
        served.machine.go.set()
        assert reply.result(10) == ("result", 1) and served.driver.book.wait_empty(5.0)
        assert not wait_ended(drivers, 0.0)
        over.set()
        assert wait_ended(drivers, 10.0) and found == [True]
    assert wait_ended(drivers, 0.0), "nothing is due any more"


def test_callbacks_on_two_devices_do_not_wait_for_each_other():
    together, found = threading.Barrier(2), list[bool]()
    with held() as one, held() as other:
        drivers = [one.driver, other.driver]

        def waits(own: Any) -> None:
            together.wait(10)
            found.append(wait_ended(drivers, 10.0))

        for served in (one, other):
            served.submit("t0", 1).add_done_callback(waits)
            served.machine.go.set()
        assert wait_ended(drivers, 30.0) and found == [True, True]


def test_what_a_callback_sends_to_another_device_is_waited_for():
    ended: list[object] = []
    with held() as one, held() as other:
        other.submit("t0", 0).add_done_callback(lambda own: again())

        def again() -> None:
            threading.Event().wait(0.01)
            one.submit("t0", 1).add_done_callback(ended.append)

        other.machine.go.set()
        threading.Timer(0.05, one.machine.go.set).start()
        assert wait_ended([one.driver, other.driver], 10.0) and len(ended) == 1


def test_whoever_waits_while_another_closes_waits_for_callbacks_too():
    over, began = threading.Event(), threading.Event()
    served = held()
    served.submit("t0", 1).add_done_callback(lambda own: began.set() or over.wait(10))
    served.machine.go.set()
    assert began.wait(10)
    closes = threading.Thread(target=served.driver.stop, daemon=True)
    closes.start()
    while not served.driver.callbacks._stopped:
        threading.Event().wait(0.001)
    assert not served.driver.callbacks.wait_called(0.0), "one is under way"
    over.set()
    assert served.driver.callbacks.wait_called(10.0)
    closes.join(10)
    assert not closes.is_alive()


ERRORS = [SystemExit(3), asyncio.CancelledError(), KeyboardInterrupt(), ValueError()]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_whatever_a_callback_raises_others_are_called_back(error, caplog):
    def raises(own: Any) -> None:
        raise error

    called = threading.Event()
    with held() as served:
        served.submit("t0", 1).add_done_callback(raises)
        served.submit("t1", 2).add_done_callback(lambda own: called.set())
        served.machine.go.set()
        assert called.wait(10) and served.driver.callbacks.wait_called(10.0)
        assert served.driver.callbacks.thread.is_alive()
    assert [r.exc_info[0] for r in caplog.records if r.exc_info is not None] == [type(error)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_ended(monkeypatch):
    """By a bug of ours. Those that come after it are called all the same."""

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    called = threading.Event()
    monkeypatch.setattr(callbacks, "call", broken)
    with held() as served:
        served.submit("t0", 1).add_done_callback(lambda own: None)
        served.machine.go.set()
        assert served.driver.book.wait_empty(10.0) and not served.driver.callbacks.wait_called(None)
        monkeypatch.undo()
        served.machine.go.clear()
        served.submit("t1", 2).add_done_callback(lambda own: called.set())
        served.machine.go.set()
        assert called.wait(10)


def test_a_callback_of_one_late_request_may_wait_for_another():
    """They came after the driver's last look into its inbox; whoever closes ends them."""
    got: list[object] = []
    served = Served(FakeMachine(takes_s=2e-5))
    served.driver.inbox.put(Stop())
    served.driver._thread.join(10)
    one, other = served.submit("t0", 1), served.submit("t1", 2)
    one.add_done_callback(lambda own: got.append(type(other.exception(10))))
    one.add_done_callback(lambda own: got.append(threading.current_thread().name))
    closes = threading.Thread(target=served.driver.stop, daemon=True)
    closes.start()
    closes.join(30)
    assert got == [Shutdown, "coalesce-callbacks"] and isinstance(one.exception(0), Shutdown)


def test_a_callback_is_called_at_once_if_the_request_has_ended_and_by_nobody_who_cancels_it():
    called: list[str] = []
    with held() as served:
        for i in range(9):  # of eight lanes at most
            served.submit("t0", i)
        while len(served.machine.launches) < 2:  # no more are dispatched before one is done
            threading.Event().wait(0.001)
        reply = served.submit("t1", 9)
        reply.add_done_callback(lambda own: called.append(threading.current_thread().name))
        assert reply.cancel() and served.driver.callbacks.wait_called(10.0)
        reply.add_done_callback(lambda own: called.append(threading.current_thread().name))
        assert called == ["coalesce-callbacks", threading.current_thread().name]


def test_whoever_is_interrupted_while_a_callback_is_handed_on_may_end_another_request():
    """By a signal handler, or a `__del__` that garbage is collected with, on the same thread."""
    own, called = callbacks.Callbacks(), list[int]()
    own.start()
    put = own.inbox.put

    def interrupted(item: Any, block: bool = True, timeout: float | None = None) -> None:
        own.inbox.put = put
        own.call(lambda reply: called.append(2), Future())
        put(item)

    own.inbox.put = interrupted
    calls = threading.Thread(target=own.call, args=(lambda reply: called.append(1), Future()), daemon=True)
    calls.start()
    calls.join(5)
    assert not calls.is_alive() and own.wait_called(10.0) and called == [2, 1]
    own.stop()
    own.thread.join(10)


def test_how_late_clients_are_is_known_without_what_their_callbacks_take():
    now = [100]
    own = callbacks.Callbacks(lambda: now[0])

    def at(time_ns: int) -> None:
        now[0] = time_ns

    own._put([(lambda reply: at(400), Future())])  # which takes 250
    own._put([(lambda reply: None, Future())])
    first, second = own.inbox.take(0.0)
    at(150)
    own.handle(first)
    assert (own.late_ns(), own.late_ns()) == (50, 0)
    at(410)
    own.handle(second)
    assert own.late_ns() == 10  # it could have begun at 400
    at(500)
    own._put([(lambda reply: None, Future())])
    at(507)
    own.handle(own.inbox.take(0.0)[0])
    assert own.late_ns() == 7


def test_what_a_callback_was_given_is_let_go_while_the_next_one_waits():
    """Though both were taken from the inbox at once."""
    gate, begun, over = threading.Event(), threading.Event(), threading.Event()
    own = callbacks.Callbacks()
    own.start()
    given, first, last = Future[Any](), Future[Any](), Future[Any]()
    is_there = weakref.ref(given)
    own.call(lambda reply: begun.set() or gate.wait(10), first)
    assert begun.wait(10)
    begun.clear()
    own.call(lambda reply: None, given)
    own.call(lambda reply: begun.set() or over.wait(10), last)
    del given
    gate.set()
    assert begun.wait(10) and is_there() is None
    over.set()
    own.stop()
    own.thread.join(10)
