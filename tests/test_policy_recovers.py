"""A device that was slow for a while, and predictions that went wrong with it: service comes back, for every policy."""

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings, strategies as st

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command, Dispatch, Reject
from coalesce.scheduler.doubt import LONGEST_NS, RUNS
from coalesce.scheduler.events import Completed, Event, Submitted
from coalesce.scheduler.faults import FAR, Faults, Slow, Stall
from coalesce.scheduler.invariants import Checker
from coalesce.scheduler.latency import FEW, LatencyModel, Prediction, STALE
from coalesce.scheduler.machine import Line, line_catalog
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.run import Outcome, Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import arrive, poisson
from tests.test_baselines import POLICIES

pytestmark = pytest.mark.once

MS = 1_000_000


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(Coalescing, id="coalescing"),
        *(pytest.param(POLICIES[name], id=name) for name in ("fifo", "clockwork", "packing", "symphony")),
    ],
)
def test_service_comes_back_after_the_device_was_slow(policy):
    """Runs take ten times as long for 100 ms: more than the SLO, and that is what is predicted then."""
    tenants = [Tenant(f"t{i}", (0,), 5 * MS) for i in range(4)]
    catalog = line_catalog({0: Line(MS // 10, MS * 9 // 10)}, (1, 2, 4))
    arrivals = arrive(Random(1), poisson(Random(2), 120.0), [t.name for t in tenants], 1500 * MS)
    run = simulate(
        policy(), tenants, catalog, arrivals, faults=Faults(slow=(Slow(10.0, None, 100 * MS, 300 * MS),)), seed=1
    )
    assert run.attainment(None, 150 * MS, 290 * MS) < 0.2
    before, after = run.attainment(None, 0, 90 * MS), run.attainment(None, 1200 * MS)
    assert after >= before - 0.1, f"{before:.2f} before, {after:.2f} after"


@pytest.mark.parametrize("slow", [None, "t0"])
def test_a_tenant_in_quarantine_is_served_again_once_it_is_not_slow_any_more(slow):
    """The device is slow for a second, or one of two tenants that share it: by far more than its SLO allows."""
    tenants = [Tenant(f"t{i}", (0,), 50 * MS) for i in range(2)]
    catalog = line_catalog({0: Line(MS // 2, MS * 3 // 2)}, (1, 2))
    arrivals = arrive(Random(1), poisson(Random(2), 200.0), [t.name for t in tenants], 20_000 * MS)
    run = simulate(
        Coalescing(), tenants, catalog, arrivals, faults=Faults(slow=(Slow(40.0, slow, 1000 * MS, 2000 * MS),)), seed=1
    )
    for tenant in tenants:
        after = run.attainment([tenant.name], 10_000 * MS)
        assert after >= 0.9, f"{tenant.name}: {after:.2f} long after it"


def test_what_looked_slow_once_is_forgotten_while_others_run():
    latency = LatencyModel()
    latency.change(Catalog(tuple(Executable(i, (Entry(0, 0, i + 1),), MS, MS) for i in range(2))))

    def observe(executable: int, ms: float) -> bool:
        run = Prediction(0, executable, 1, MS, MS, round(ms * MS))
        return latency.observe(run, frozenset("a"))

    for _ in range(FEW):
        observe(1, 1.5)
    assert latency.of(1).l50_ns == 1.5 * MS
    for _ in range(STALE):
        observe(0, 1.0)
    assert latency.of(1).l50_ns == 1.5 * MS
    assert observe(0, 1.0) and latency.of(1).l50_ns == MS
    assert not observe(0, 1.0)


class Idle:
    """Watches a simulation for requests that are refused though the device is idle and nobody waits."""

    def __init__(self) -> None:
        self.refused_ns: list[int] = []
        self._flying: set[int] = set()
        self._waiting: set[int] = set()

    def __call__(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        if isinstance(event, Completed):
            self._flying.discard(event.bundle)
        if isinstance(event, Submitted):
            if not self._flying and not self._waiting and isinstance(commands[0], Reject):
                self.refused_ns.append(now_ns)
            self._waiting |= {request.id for request in event.requests}
        for command in commands:
            if isinstance(command, Reject):
                self._waiting.discard(command.request)
            elif isinstance(command, Dispatch):
                self._flying.add(command.bundle)
                self._waiting.difference_update(*command.lanes)


TIMES_US = (200, 350, 340, 470, 670)  # as a small MLP takes on a CPU, in widths 1 to 16
SLOS = 2 * MS
END_NS = 100 * MS


def after_trouble(rate: float, seed: int, faults: Faults, spread: float, trouble_ns: int) -> tuple[Run, Idle, int]:
    """Service for 50 ms, then trouble; and when it must be over for the policy too, by what `doubt` says."""
    tenants = [Tenant(f"t{i}", (0,), SLOS) for i in range(8)]
    made = (Executable(i, (Entry(0, 0, 1 << i),), us * 1000, int(us * 1000 * spread)) for i, us in enumerate(TIMES_US))
    longest_ns = trouble_ns if faults.stalls else int(max(TIMES_US) * 1000 * faults.slow[0].factor)
    quiet_ns = 50 * MS + trouble_ns + max(LONGEST_NS, RUNS * longest_ns) + longest_ns
    arrivals = arrive(Random(seed), poisson(Random(seed + 1), rate), [t.name for t in tenants], quiet_ns + END_NS)
    idle = Idle()
    watchers = [idle, Checker(depth=2).see]
    run = simulate(Coalescing(), tenants, Catalog(tuple(made)), arrivals, faults=faults, seed=seed, watchers=watchers)
    return run, idle, quiet_ns


@settings(max_examples=settings().max_examples // 20)
@given(
    rate=st.floats(200, 3000),
    factor=st.floats(1.5, 100.0),
    ms=st.integers(1, 300),
    spread=st.floats(1.0, 2.0),
    seed=st.integers(0, 1000),
)
def test_a_device_that_was_slow_serves_everybody_again(rate, factor, ms, spread, seed):
    faults = Faults(slow=(Slow(factor, None, 50 * MS, (50 + ms) * MS),))
    run, idle, quiet_ns = after_trouble(rate, seed, faults, spread, ms * MS)
    assert [ns for ns in idle.refused_ns if ns >= quiet_ns] == []
    assert run.attainment(None, quiet_ns) >= 0.97


@settings(max_examples=settings().max_examples // 20)
@given(
    rate=st.floats(200, 3000),
    hiccups=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    spread=st.floats(1.0, 2.0),
    seed=st.integers(0, 1000),
)
def test_a_hiccup_of_the_host_is_over_when_it_is_over(rate, hiccups, spread, seed):
    """Whoever comes to an idle device 5 ms after a hiccup is served, and nearly all of the others are."""
    at_ms, stalls = 50, []
    for ms in hiccups:
        stalls.append(Stall(at_ms * MS, (at_ms + ms) * MS))
        at_ms += ms + 30
    run, idle, _ = after_trouble(rate, seed, Faults(stalls=tuple(stalls)), spread, 0)
    for stall, ends_ns in zip(stalls, [*(later.from_ns for later in stalls[1:]), FAR], strict=True):
        assert not any(stall.until_ns + 5 * MS <= ns < ends_ns for ns in idle.refused_ns)
    quiet = [(s.until_ns + 5 * MS, s.until_ns + 28 * MS) for s in stalls]
    counts = sum((run.counts(None, *span) for span in quiet), Counter())
    assert counts[Outcome.OK] >= 0.95 * counts.total() - 2
