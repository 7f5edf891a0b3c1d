"""Ending a runtime: from several threads, from a signal handler, and beside callbacks that do not return."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from coalesce.errors import InvalidInput, Shutdown
from coalesce.runtime import driver, end
from coalesce.runtime.bundle import Bundle
from coalesce.runtime.closing import Closing
from coalesce.runtime.reply import Reply
from coalesce.runtime.runtime import Runtime
from tests.annotations import nothing_checked

X = np.ones((1, 4), np.float32)
SLO = 60.0


class Held:
    """A runtime with one request on the device, until `gate` is set, and two that wait behind it."""

    def __init__(self, gate: threading.Event) -> None:
        self.gate, self.replies = gate, list[Reply]()
        self.rt = Runtime(widths=(1,), compiled=False)
        self.rt.add_tenant("t", lambda w, x: x @ w, np.eye(4, dtype=np.float32), example=(X,), slo=SLO)

    def ask(self) -> None:
        self.gate.clear()
        self.replies += [self.rt.submit("t", X) for _ in range(4)]
        while not self.replies[0].running():
            time.sleep(0.001)


@pytest.fixture
def held(monkeypatch) -> Iterator[Held]:
    gate, wait, is_at_hand = threading.Event(), Bundle.wait, Bundle.is_at_hand
    monkeypatch.setattr(Bundle, "wait", lambda own: gate.wait(60) and wait(own))
    monkeypatch.setattr(Bundle, "is_at_hand", lambda own, within_s: gate.is_set() and is_at_hand(own, within_s))
    gate.set()
    own = Held(gate)
    yield own
    own.gate.set()
    own.rt.close(drain=False)


@contextmanager
def beside(do: Callable[[], object]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=do)
    thread.start()
    yield thread
    thread.join(60)
    assert not thread.is_alive()


def is_over(own: Held) -> bool:
    return not any(thread.is_alive() for thread in own.rt._stations[0].driver.threads)


def test_who_drains_is_hurried_by_another_thread(held: Held):
    held.ask()
    with beside(held.rt.close):
        while held.rt.health().status != "closed":
            time.sleep(0.001)
        with beside(lambda: held.rt.close(drain=False)):
            assert isinstance(held.replies[-1].exception(60), Shutdown)  # it was to be served
            held.gate.set()
    assert held.replies[0].exception(60) is None and is_over(held)


def test_a_shorter_timeout_counts(held: Held):
    held.ask()
    with beside(held.rt.close), beside(lambda: held.rt.close(timeout=0.05)):
        assert isinstance(held.replies[-1].exception(60), Shutdown)
        held.gate.set()
    assert is_over(held)


def test_a_signal_handler_closes_what_its_thread_is_closing(held: Held):
    held.ask()

    def handler(*_: object) -> None:
        held.rt.close(drain=False)
        assert isinstance(held.replies[-1].exception(60), Shutdown)
        held.gate.set()

    def send() -> None:
        while held.rt._end.closing._who is None:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with beside(send):
            held.rt.close()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert is_over(held)


def test_who_is_interrupted_has_closed_nothing():
    closing, closed = Closing(lambda: None), list[str]()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        closing.by(interrupted, None, None)
    assert not closing.is_closed
    closing.by(lambda: closed.append("now"), None, None)
    closing.by(lambda: closed.append("again"), None, None)
    assert closed == ["now"] and closing.is_closed


def test_a_callback_that_does_not_return_is_left(held: Held, monkeypatch, caplog):
    monkeypatch.setattr(driver, "JOIN_S", 0.02)
    monkeypatch.setattr(end, "PATIENCE_S", 0.05)
    called, over = threading.Event(), threading.Event()
    reply = held.rt.submit("t", X)
    reply.add_done_callback(lambda _: (called.set(), over.wait(60)))
    assert called.wait(60)
    held.rt.close(drain=False)
    assert "has not returned" in caplog.text
    over.set()


def test_who_waits_for_callbacks_is_hurried_too(held: Held, monkeypatch):
    monkeypatch.setattr(driver, "JOIN_S", 0.02)
    called, over = threading.Event(), threading.Event()
    held.rt.submit("t", X).add_done_callback(lambda _: (called.set(), over.wait(60)))
    assert called.wait(60)
    with beside(held.rt.close):
        while held.rt.health().status != "closed":
            time.sleep(0.001)
        held.rt.close(timeout=0.05)
    over.set()


@pytest.mark.parametrize("timeout", ["1", float("nan"), [], 1j])
def test_a_timeout_that_is_none_changes_nothing(held: Held, timeout: Any):
    rt = held.rt
    ways = rt.close, rt.drain, rt.warm_up, lambda timeout: rt.remove_tenant("t", timeout=timeout)
    for way in ways:
        with nothing_checked(), pytest.raises(InvalidInput, match="timeout is"):
            way(timeout=timeout)
    np.testing.assert_array_equal(rt.submit("t", X).result(60), X)
    with nothing_checked(), pytest.raises(InvalidInput, match="a name is a str, not a list"):
        rt.submit(["t"], X)  # pyright: ignore
    assert rt.drain(timeout=float("inf"))


def test_a_tenant_that_is_coming_is_waited_for(held: Held):
    """A thread in the middle of JAX's code must not be there when the interpreter ends."""
    tracing, gate = threading.Event(), threading.Event()

    def traced_long(w: Any, x: Any) -> Any:
        tracing.set()
        assert gate.wait(60)
        return x @ w

    added = held.rt.add_tenant("new", traced_long, np.eye(4, dtype=np.float32), example=(X,), slo=SLO, wait=False)
    assert tracing.wait(60)
    assert not added.cancel(), "it comes, and remove_tenant lets it go"
    with beside(held.rt.close) as closing:
        while not is_over(held):
            time.sleep(0.001)
        assert closing.is_alive()
        gate.set()
    assert isinstance(added.exception(0), Shutdown)
    assert not [thread.name for thread in threading.enumerate() if thread.name == "coalesce-add-new"]
