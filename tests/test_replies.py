"""What `submit` returns is a future of concurrent.futures, whose functions for many futures take it."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed, Future, wait
from typing import Any

import pytest
from hypothesis import given, strategies as st

from coalesce.errors import DeviceError
from coalesce.runtime.reply import Reply
from tests.fake_machine import FakeLaunched, FakeMachine, Served


def test_wait_and_as_completed_know_cancelled_requests():
    machine = FakeMachine()
    machine.go.clear()
    with Served(machine) as served:
        replies = [served.submit("t0", i) for i in range(40)]
        while not machine.launches:
            threading.Event().wait(0.001)
        cancelled = {reply for reply in replies if reply.cancel()}
        assert cancelled and all(reply.cancel() for reply in cancelled)  # twice is once
        assert wait(cancelled, 10).not_done == set()
        machine.go.set()
        assert {reply for reply in as_completed(replies, 10) if not reply.cancelled()} == set(replies) - cancelled


def test_results_that_do_not_come_back_end_everything(monkeypatch):
    def broken(self: FakeLaunched) -> list[list[object]]:
        raise RuntimeError("the bus is full")

    monkeypatch.setattr(FakeLaunched, "results", broken)
    with Served(FakeMachine()) as served:
        replies = [served.submit("t0", i) for i in range(20)]
        assert wait(replies, 10).not_done == set()
        assert all(isinstance(reply.exception(0), DeviceError) for reply in replies)


class Nobody:
    def withdraw(self, request: int) -> None:
        pass

    def call_back(self, callback: Callable[[Any], Any], reply: Future[Any]) -> None:
        callback(reply)

    def call_all_back(self, replies: Sequence[Reply]) -> None:
        raise AssertionError("nobody has ended one")


def outcome(step: Callable[[Any], Any], own: Future[Any]) -> Any:
    try:
        return step(own)
    except Exception as e:
        return type(e)


def end(own: Future[Any], result: Any, error: Exception | None) -> None:
    """As whoever serves it does."""
    if isinstance(own, Reply) and own.end_alone(result, error):
        for callback in own.callbacks:
            callback(own)
    elif error is not None:
        own.set_exception(error)
    else:
        own.set_result(result)


STEPS: dict[str, Callable[[Any], Any]] = {
    "cancel": lambda own: own.cancel(),
    "cancelled": lambda own: own.cancelled(),
    "running": lambda own: own.running(),
    "done": lambda own: own.done(),
    "result": lambda own: own.result(0),
    "exception": lambda own: type(own.exception(0)),
    "call back": lambda own: own.add_done_callback(lambda own: vars(own).setdefault("called", []).append(own.done())),
    "begin": lambda own: own.set_running_or_notify_cancel(),
    "give": lambda own: own.set_result(7),
    "fail": lambda own: own.set_exception(ValueError()),
    "end": lambda own: end(own, 8, None),
    "end badly": lambda own: end(own, None, ValueError()),
    "wait": lambda own: len(wait([own], 0).done),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=8))
def test_it_is_what_a_future_is(steps):
    """Whatever is done to it, in whatever order."""
    reply, future = Reply(0, Nobody()), Future[Any]()
    for step in steps:
        if step == "begin" and future.running():
            continue  # a mistake of ours, which it logs
        assert outcome(STEPS[step], reply) == outcome(STEPS[step], future), step
    assert vars(reply).get("called") == vars(future).get("called")


@pytest.mark.parametrize("fails", [False, True])
def test_whoever_waits_is_woken(fails):
    """One that was waited for before it began, one since, and one that nobody waits for."""
    replies = [Reply(i, Nobody()) for i in range(3)]
    got: list[Any] = []
    waits = [threading.Thread(target=lambda own=own: got.append(own.exception(10))) for own in replies[:2]]
    waits[0].start()
    for reply in replies:
        reply.set_running_or_notify_cancel()
    waits[1].start()
    for i, reply in enumerate(replies):
        reply.set_exception(ValueError()) if fails else reply.set_result(i)
    for thread in waits:
        thread.join(10)
    assert [type(error) for error in got] == [ValueError if fails else type(None)] * 2
    assert wait(replies, 10).not_done == set() and all(reply.done() for reply in replies)


def test_a_callback_that_raises_at_once_is_logged_as_futures_do(caplog):
    for own in (Reply(0, Nobody()), Future[int]()):
        own.set_result(1)
        own.add_done_callback(lambda own: 1 / 0)
    reply, future = [(own.name, own.msg, own.exc_info and own.exc_info[0]) for own in caplog.records]
    assert reply == future
