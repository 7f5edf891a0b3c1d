"""A device that was slow for a while, and predictions that went wrong with it: service comes back, for every policy."""

from random import Random

import pytest

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.faults import Faults, Slow
from coalesce.scheduler.latency import FEW, LatencyModel, Prediction, STALE
from coalesce.scheduler.machine import Line, line_catalog
from coalesce.scheduler.request import Tenant
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
