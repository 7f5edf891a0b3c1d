"""A host that hiccups is nobody's fault: no tenant is put into quarantine for it, and a real straggler is found.

A hiccup makes some bundles slow, whoever is in them: the device is told what it runs by number, so that the same ones
are slow whatever the policy decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random

import pytest

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Dispatch, Quarantine, Readmit, Reject
from coalesce.scheduler.costs import Costs
from coalesce.scheduler.events import CatalogChanged, Submitted, TenantAdded
from coalesce.scheduler.faults import Faults, Slow
from coalesce.scheduler.latency import LatencyModel
from coalesce.scheduler.machine import quantiles, Takes
from coalesce.scheduler.request import Request, Tenant
from coalesce.scheduler.run import Run
from coalesce.scheduler.workloads import Arrival
from tests.simulated import capacity, catalog, checked, MS, SLO, steady, tenants

pytestmark = pytest.mark.once

NAMES = [f"t{i}" for i in range(8)]
Slowed = Callable[[int, int], int]  # the number of a bundle, what it takes -> what it takes with the hiccup


def hiccuping(slowed: Slowed) -> Takes:
    numbers: Iterator[int] = iter(range(1 << 62))

    def takes(executable: Executable, rng: Random) -> int:
        return slowed(next(numbers), quantiles(executable, rng))

    return takes


def bursts(lengths: Sequence[int], apart: int = 60) -> Slowed:
    """So many bundles in a row take five times as long; then some do not, and so on."""
    slow = {at for n in range(20) for at in in_burst(lengths, apart, n)}
    return lambda number, ns: 5 * ns if number in slow else ns


def in_burst(lengths: Sequence[int], apart: int, number: int) -> range:
    length = lengths[number % len(lengths)]
    end = apart * (number + 1) + sum(lengths[n % len(lengths)] for n in range(number + 1))
    return range(end - length, end)


def now_and_then(share: float, seed: int, more_ns: int = 0) -> Slowed:
    """Each bundle with this chance: five times as long, or longer by some time."""
    rng = Random(seed)
    return lambda number, ns: (ns + more_ns if more_ns else 5 * ns) if rng.random() < share else ns


def everybody(end_ns: int) -> list[Arrival]:
    """All tenants at once, so that they share every bundle."""
    return [Arrival(at, name) for at in range(0, end_ns, 4 * MS) for name in NAMES]


def some(end_ns: int) -> list[Arrival]:
    return steady(0.2 * capacity(), end_ns, NAMES)


def few(end_ns: int) -> list[Arrival]:
    """Most run alone anyway."""
    return steady(300.0, end_ns, NAMES)


def in_turn(end_ns: int) -> list[Arrival]:
    """One after another, always in the same order."""
    return [Arrival(at, NAMES[n % len(NAMES)]) for n, at in enumerate(range(0, end_ns, 5 * MS // 2))]


LOADS = {"everybody": everybody, "some": some, "few": few}
in_loads = pytest.mark.parametrize("load", LOADS)
in_segments = pytest.mark.parametrize("segments", [1, 3])


def told(run: Run) -> list[tuple[int, Quarantine | Readmit]]:
    return [(at, c) for _, at, commands in run.log for c in commands if isinstance(c, Quarantine | Readmit)]


def serve(load: str, slowed: Slowed, end_ns: int, segments: int = 1, faults: Faults | None = None) -> Run:
    arrivals = LOADS[load](end_ns)
    what, takes = catalog(segments=segments), hiccuping(slowed)
    run = checked(tenants(8), what, arrivals, takes=takes, faults=faults, keep_log=True, patience_ns=25 * MS)
    assert run.decisions < 5 * (len(arrivals) + run.bundles)  # it is not woken over and over
    return run


@in_segments
@in_loads
def test_bundles_that_are_slow_in_a_row_are_nobodys_fault(load, segments):
    assert told(serve(load, bursts(range(1, 21)), 1_500 * MS, segments)) == []


@pytest.mark.slow
@pytest.mark.parametrize("length", range(1, 21))
@in_segments
@in_loads
def test_bundles_that_are_slow_in_a_row_again_and_again_are_nobodys_fault(load, segments, length):
    assert told(serve(load, bursts([length]), 2_500 * MS, segments)) == []


@in_loads
def test_one_bundle_in_ten_that_is_slow_is_nobodys_fault(load):
    assert told(serve(load, now_and_then(0.1, 1), 1_000 * MS)) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("share", [0.01, 0.03, 0.1, 0.3])
@in_segments
@in_loads
def test_bundles_that_are_slow_now_and_then_are_nobodys_fault(load, segments, share, seed):
    assert told(serve(load, now_and_then(share, 100 + seed), 1_500 * MS, segments)) == []


@pytest.mark.parametrize("more_ms", [2, 20])
def test_a_host_that_is_late_now_and_then_is_nobodys_fault(more_ms):
    assert told(serve("everybody", now_and_then(0.1, 1, more_ms * MS), 1_000 * MS)) == []


def in_step(turns: int, seed: int) -> Slowed:
    """What slows the host comes once a round of tenants for so many rounds, and elsewhere now and then."""
    rng = Random(seed)

    def slowed(number: int, ns: int) -> int:
        at = number % 240
        return 5 * ns if (at % len(NAMES) == 3 and at < turns * len(NAMES)) or rng.random() < 0.02 else ns

    return slowed


@pytest.mark.parametrize("turns", [2, 3, 4, 5])
def test_hiccups_that_keep_step_with_one_tenant_for_a_while_are_not_its_fault(turns):
    """As on a machine with more to do than cores, whose scheduler gave a tenant's turn to somebody else each time."""
    arrivals, takes = in_turn(4_000 * MS), hiccuping(in_step(turns, 1))
    run = checked(tenants(8), catalog(), arrivals, takes=takes, keep_log=True, patience_ns=25 * MS)
    assert told(run) == []


HICCUPS = {
    "none": lambda: bursts([0]),
    "of 20": lambda: bursts([20], 300),
    "one in 50": lambda: now_and_then(0.02, 1),
}


@pytest.mark.parametrize("hiccups", HICCUPS)
@in_loads
def test_a_straggler_is_found_on_a_host_that_hiccups(load, hiccups):
    run = serve(load, HICCUPS[hiccups](), 1_500 * MS, faults=Faults(slow=(Slow(5.0, "t0", 300 * MS),)))
    assert {c.tenant for _, c in told(run)} == {"t0"}


def test_two_stragglers_are_found():
    run = serve(
        "some", bursts([0]), 2_500 * MS, faults=Faults(slow=tuple(Slow(5.0, t, 300 * MS) for t in ("t0", "t1")))
    )
    assert {c.tenant for _, c in told(run)} == {"t0", "t1"}


@pytest.mark.parametrize(("count", "arrivals", "factor"), [
    (1, steady(300.0, 600 * MS, ["t0"]), 5.0), (8, everybody(600 * MS), 2.6),
], ids=["one tenant", "all share every bundle"])  # fmt: skip
def test_where_nobody_can_be_told_from_the_device_it_is_slow_and_that_is_learnt(count, arrivals, factor):
    policy, faults = Coalescing(), Faults(slow=(Slow(factor, None, 100 * MS),))
    run = checked(tenants(count), catalog(), arrivals, policy, faults=faults, keep_log=True, patience_ns=25 * MS)
    assert told(run) == []
    last = policy.latency.predictions[-1]
    assert last.l50_ns == pytest.approx(last.actual_ns, rel=0.5)


def test_a_head_is_not_hopeless_before_it_is_looked_at():
    """A wider executable may have turned out to take less than the narrowest: the policy would be woken in vain."""
    made = [
        Executable(2 * s + i, (Entry(0, s, w),), ns, ns) for s in (0, 1) for i, (w, ns) in enumerate([(1, 5), (4, 1)])
    ]
    costs = Costs(latency := LatencyModel())
    latency.change(what := Catalog(tuple(made), {0: 2}))
    costs.change(what, {0: 100})
    for segment in (0, 1):
        assert costs.of((0, segment)).ahead_ns >= costs.of((0, segment)).alone.l50_ns


def test_what_takes_no_time_has_a_most_efficient_width():
    """A clock may be too coarse for what runs."""
    costs = Costs(latency := LatencyModel())
    latency.change(what := Catalog(tuple(Executable(w, (Entry(0, 0, w),), 0, 0) for w in (1, 2))))
    costs.change(what, {0: SLO})
    assert costs.of((0, 0)).options[costs.of((0, 0)).steady].width == 2


def test_nobody_is_refused_because_a_run_may_hiccup():
    """Runs that mostly take 1 ms and once in a while 6: who comes while one is on the device has time for another."""
    policy = Coalescing()
    policy.on_event(CatalogChanged(Catalog((Executable(0, (Entry(0, 0, 1),), MS, 6 * MS),))), 0)
    for name in NAMES:
        policy.on_event(TenantAdded(Tenant(name, (0,), 6 * MS)), 0)
    (first,) = policy.on_event(Submitted((Request(0, "t0", 0, 0, 6 * MS),)), 0)
    assert isinstance(first, Dispatch)
    later = policy.on_event(Submitted((Request(1, "t1", 0, MS // 10, 6 * MS + MS // 10),)), MS // 10)
    assert not any(isinstance(command, Reject) for command in later)
