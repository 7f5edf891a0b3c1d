"""What `submit` returns is a future of concurrent.futures, whose functions for many futures take it."""

import threading
from concurrent.futures import as_completed, wait

import pytest

from coalesce.errors import DeviceError
from tests.fake_machine import FakeLaunched, FakeMachine, Served

pytestmark = pytest.mark.once


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
