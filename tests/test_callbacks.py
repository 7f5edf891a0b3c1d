"""Users' callbacks of requests, and who waits for them: a driver on a machine without JAX."""

import threading

import pytest

from tests.fake_machine import FakeMachine, Served

pytestmark = pytest.mark.once


def test_where_nothing_is_due_nobody_waits():
    with Served(FakeMachine(takes_s=2e-5)) as served:
        called = threading.Event()
        served.submit("t0", 1).add_done_callback(lambda own: called.set())
        assert called.wait(10) and served.driver.callbacks.wait_called(10.0)
        assert all(served.driver.callbacks.wait_called(0.0) for _ in range(200))


def test_whoever_waits_while_another_closes_waits_for_callbacks_too():
    over, began = threading.Event(), threading.Event()
    served = Served(FakeMachine(takes_s=2e-5))
    served.submit("t0", 1).add_done_callback(lambda own: began.set() or over.wait(10))
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
