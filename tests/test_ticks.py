"""Somebody wakes up on every processor while a compiler works, and ends with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from coalesce.runtime import ticks
from coalesce.runtime.second import end, started
from coalesce.runtime.ticks import BEGIN, EVERY_S, FEW, follow, STOP, telling, tick

BE_IDLE = """
import os
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
assert os.sched_getscheduler(0) == os.SCHED_IDLE
"""


def may_be_idle() -> bool:
    """Some sandboxes refuse it."""
    return subprocess.run([sys.executable, "-c", BE_IDLE], capture_output=True).returncode == 0


linux = pytest.mark.skipif(not may_be_idle(), reason="no process can be idle here")


def test_it_does_as_it_is_told():
    at_work = threading.Event()
    follow([BEGIN], at_work)
    assert at_work.is_set()
    follow([BEGIN, STOP], at_work)
    assert not at_work.is_set()


class Over(Exception):
    pass


class Work(threading.Event):
    """For a thread that looks at it so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def wait(self, timeout: float | None = None) -> bool:
        self.left -= 1
        if self.left < 0:
            raise Over
        return True


@linux
def test_it_wakes_up_on_its_processor_and_preempts_only_what_is_idle(monkeypatch):
    naps, found = list[float](), list[object]()

    def sleep(s: float) -> None:
        naps.append(s)
        found[:] = [os.sched_getaffinity(0), os.sched_getscheduler(0)]

    def run() -> None:
        with pytest.raises(Over):
            tick(processor, Work(3))

    monkeypatch.setattr(ticks, "time", type("Clock", (), {"sleep": staticmethod(sleep)}))
    processor = max(os.sched_getaffinity(0))
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert naps == [EVERY_S] * 3 and found == [{processor}, os.SCHED_BATCH]


@linux
def test_where_that_is_not_allowed_it_does_nothing(monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    tick(0, Work(0))


few = pytest.mark.skipif((os.cpu_count() or 1) > FEW, reason="there are enough processors")


def state(pid: int, what: str) -> str:
    """Z where it has ended."""
    try:
        return re.findall(rf"{what}:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())[0]
    except (OSError, IndexError):
        return "Z"


@linux
@few
def test_a_compiler_has_one_that_ends_with_it_and_that_somebody_waits_for():
    compiler = started(idle=True)
    while os.sched_getscheduler(compiler.pid) != os.SCHED_IDLE:  # it is starting
        assert compiler.poll() is None
        time.sleep(0.01)
    assert compiler.ticking is not None
    ticking = compiler.ticking.pid
    assert os.sched_getscheduler(ticking) != os.SCHED_IDLE
    while not int(state(ticking, "SigIgn"), 16) & 1 << signal.SIGINT - 1:
        time.sleep(0.01)
    os.kill(ticking, signal.SIGINT)  # from a terminal all get it
    assert compiler.ticking.poll() is None
    compiler.kill()
    while state(ticking, "State") != "Z":  # nobody else writes to it
        time.sleep(0.01)
    end(compiler)
    for ended in compiler.pid, ticking:
        with pytest.raises(ChildProcessError):
            os.waitpid(ended, os.WNOHANG)


def test_orders_arrive_and_nobody_minds_when_it_has_ended():
    reads, writes = os.pipe()
    tell = telling(str(writes))
    tell(BEGIN)
    assert os.read(reads, 10) == BEGIN
    os.close(reads)
    tell(STOP)
    os.close(writes)
    telling(None)(BEGIN)


@linux
def test_it_ends_with_its_input():
    ended = subprocess.run([sys.executable, "-m", "coalesce.runtime.ticks"], input=BEGIN + STOP, timeout=60)
    assert ended.returncode == 0


@linux
def test_there_is_none_where_none_can_be_started_or_is_needed(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert ticks.started({}) is None
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("there are enough processors"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(FEW + 1)))
    assert ticks.started({}) is None
