"""A policy in a process of its own decides as it would here, and ends with the runtime."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from random import Random

import jax.numpy as jnp
import numpy as np
import pytest

from coalesce.errors import PolicyError
from coalesce.runtime import watchdog
from coalesce.runtime.elsewhere import Elsewhere, end
from coalesce.runtime.runtime import Runtime
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.events import Completed, Timer
from coalesce.scheduler.machine import Line, line_catalog
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import arrive_apart
from tests.fake_machine import FakeMachine, Served

US = 1_000
CATALOG = line_catalog({0: Line(100 * US, 900 * US)}, (1, 2, 4), spread=1.0)
TENANTS = [Tenant(f"t{i}", (0,), 2_500 * US) for i in range(4)]


@contextmanager
def elsewhere(*given: object) -> Iterator[Elsewhere]:
    policy = Elsewhere(*given)  # pyright: ignore
    try:
        yield policy
    finally:
        policy.close()


@pytest.mark.once
@pytest.mark.parametrize("awake_s", [0.0, 1e-3])
def test_it_decides_the_same(awake_s):
    def log(policy: object) -> object:
        arrivals = arrive_apart(Random(3), 1.0, {tenant.name: 400.0 for tenant in TENANTS}, 300_000 * US)
        return simulate(policy, TENANTS, CATALOG, arrivals, keep_log=True).log  # pyright: ignore

    with elsewhere(partial(Coalescing, lead_ns=50 * US), awake_s) as policy:
        assert log(policy) == log(Coalescing(lead_ns=50 * US))


@pytest.mark.once
def test_what_it_raises_is_raised_here_and_it_goes_on():
    unknown = Completed(7, 0, 1)
    with pytest.raises(Exception) as here:
        Coalescing().on_event(unknown, 2)
    with elsewhere() as policy:
        with pytest.raises(type(here.value)):
            policy.on_event(unknown, 2)
        assert list(policy.on_event(Timer(), 3)) == []


@pytest.mark.once
def test_a_terminal_interrupts_who_serves_alone():
    with elsewhere() as policy:
        assert os.getpgid(policy._process.pid) != os.getpgid(0)


@pytest.mark.once
def test_one_that_has_ended_is_an_error():
    with elsewhere() as policy:
        policy._process.kill()
        policy._process.wait()
        for _ in range(2):
            with pytest.raises(PolicyError, match="policy's process"):
                policy.on_event(Timer(), 1)


def test_a_runtime_is_served_from_there_and_ends_it():
    x = np.ones((1, 4), np.float32)
    made: list[Elsewhere] = []

    def make() -> Elsewhere:
        made.append(Elsewhere())
        return made[-1]

    with Runtime(policy=make, widths=(1, 2), segments=1, compiled=False) as rt:
        for i in range(2):
            rt.add_tenant(f"t{i}", lambda w, x: x @ w, jnp.eye(4) * (i + 1), example=(x,), slo=60.0)
        got = [reply.result(60) for reply in [rt.submit(f"t{i % 2}", x) for i in range(6)]]
    assert [float(y[0, 0]) for y in got] == [1.0, 2.0] * 3
    assert made[0]._process.poll() is not None


@pytest.mark.once
def test_pipes_are_closed_when_nobody_reads_them_any_more():
    """Their numbers would be somebody else's files."""
    asking, was_asked, ended = threading.Lock(), list[bool](), list[int | None]()

    class Pipe(io.BytesIO):
        def close(self) -> None:
            was_asked.append(asking.locked())
            ended.append(process.poll())
            super().close()

    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        own = process.stdin, process.stdout
        process.stdin, process.stdout = Pipe(), Pipe()
        end(process, asking)
        assert was_asked == [True, True] and ended == [-signal.SIGKILL] * 2
        process.stdin, process.stdout = own
    assert not asking.locked()


@pytest.mark.once
@pytest.mark.parametrize(("signalled", "why"), [(signal.SIGSTOP, "has not answered"), (signal.SIGKILL, "has ended")])
def test_a_process_that_hangs_or_ends_is_no_device_that_does(signalled, why, monkeypatch):
    """Whoever waits is told of the policy, and so is whoever comes later; nothing of it is left."""
    monkeypatch.setattr(watchdog, "MOST_S", 0.05)  # it would look every 2.5 s
    machine = FakeMachine()
    machine.go.clear()
    with elsewhere() as policy:
        policy.on_event(Timer(), 0)  # it has started, however long that took
        with Served(machine, policy=policy, hang_s=20.0) as served:
            check_ended(served, machine, policy, signalled, why)


def check_ended(served: Served, machine: FakeMachine, policy: Elsewhere, signalled: int, why: str) -> None:
    running = served.submit("t0", 1)
    while not machine.launches:
        time.sleep(0.001)
    os.kill(policy._process.pid, signalled)
    if signalled == signal.SIGSTOP:  # so that no host is too slow before
        served.driver._hang_ns = 500_000_000
    machine.go.set()  # the policy is told that this bundle has ended, while the driver does not know yet
    waits = served.submit("t1", 2)
    ended = running.exception(30)  # the driver may know before the results are handed out
    assert ended is None or (signalled == signal.SIGKILL and isinstance(ended, PolicyError))
    for reply in waits, served.submit("t2", 3):
        error = reply.exception(30)
        assert isinstance(error, PolicyError) and why in str(error)
    assert policy._process.wait(30) == -signal.SIGKILL
