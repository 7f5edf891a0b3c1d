"""Where tenants are placed, and what devices make of it."""

from collections import Counter

import pytest

from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.fleet import Need, place, simulate_fleet
from coalesce.scheduler.request import Tenant
from tests.simulated import capacity, catalog, steady, tenants

pytestmark = pytest.mark.once
MS = 1_000_000


def test_families_stay_together_and_loads_even():
    who = tenants(12, 4)
    needs = {t.name: Need([0.25, 0.2, 0.1, 0.05][t.families[0]], 10) for t in who}
    placed = place(who, needs, 2, 1000)
    for family in range(4):
        assert len({placed[t.name] for t in who if t.families == (family,)}) == 1
    loads = Counter({device: sum(needs[t].load for t, d in placed.items() if d == device) for device in (0, 1)})
    assert loads[0] == pytest.approx(loads[1], abs=0.31) and max(loads.values()) <= 1


def test_memory_counts_too():
    who = [Tenant(name, (i,), MS) for i, name in enumerate("abc")]
    placed = place(who, {"a": Need(0.5, 60), "b": Need(0.4, 60), "c": Need(0.1, 40)}, 2, 100)
    assert placed["a"] != placed["b"]
    with pytest.raises(ValueError, match="tenant 'c' needs 50 bytes, and 40 are free at most"):
        place(who, {"a": Need(0.5, 60), "b": Need(0.4, 60), "c": Need(0.1, 50)}, 2, 100)


def test_a_family_that_is_too_large_for_a_device_is_spread():
    who = tenants(8)
    placed = place(who, {t.name: Need(0.2) for t in who}, 2, 0)
    assert sorted(Counter(placed.values()).values()) == [4, 4]


def test_two_devices_serve_what_one_cannot():
    who = tenants(10, 2)
    arrivals = steady(1.2 * capacity(), 100 * MS, [t.name for t in who])
    (one,) = simulate_fleet(Coalescing, {t.name: 0 for t in who}, who, catalog(2), arrivals)
    placed = place(who, {t.name: Need(0.12) for t in who}, 2, 0)
    two = simulate_fleet(Coalescing, placed, who, catalog(2), arrivals)
    assert sum(len(run.requests) for run in two) == len(arrivals) == len(one.requests)
    assert one.attainment() < 0.9 and min(run.attainment() for run in two) > 0.97
