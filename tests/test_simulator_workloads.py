"""Arrival processes, against what their parameters promise."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from statistics import mean, pstdev

import pytest

from coalesce.scheduler import workloads
from coalesce.scheduler.workloads import SECOND

pytestmark = pytest.mark.once


def gaps(times: Iterator[int], count: int = 20_000) -> list[int]:
    return [b - a for a, b in pairwise(islice(times, count))]


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 4.0])
def test_gamma_has_its_rate_and_its_variation(cv):
    found = gaps(workloads.gamma(Random(1), 1000.0, cv))
    assert min(found) >= 0
    assert mean(found) == pytest.approx(SECOND / 1000, rel=0.1)
    assert pstdev(found) / mean(found) == pytest.approx(cv, rel=0.1, abs=1e-6)


def test_poisson_is_gamma_of_one():
    found = gaps(workloads.poisson(Random(2), 500.0))
    assert mean(found) == pytest.approx(SECOND / 500, rel=0.05)
    assert pstdev(found) == pytest.approx(mean(found), rel=0.05)


def test_mmpp_stays_at_each_rate():
    times = [t for t in islice(workloads.mmpp(Random(3), (100.0, 0.0, 5000.0), (1.0, 1.0, 0.1)), 40_000)]
    assert times == sorted(times)
    assert len(times) / (times[-1] / SECOND) == pytest.approx((100 + 500) / 2.1, rel=0.15)
    found = gaps(iter(times))
    assert pstdev(found) / mean(found) > 3


def test_diurnal_goes_up_and_down():
    times = list(islice(workloads.diurnal(Random(4), 1000.0, 0.8, 1.0), 20_000))
    quarter = Counter(4 * t // SECOND % 4 for t in times)
    assert quarter[0] + quarter[1] > 2.5 * (quarter[2] + quarter[3])
    assert len(times) / (times[-1] / SECOND) == pytest.approx(1000, rel=0.05)


def test_zipf_splits_arrivals():
    shares = workloads.zipf(4)
    assert sum(shares) == pytest.approx(1) and shares[0] == pytest.approx(2 * shares[1])
    assert workloads.zipf(4, 0.0) == [0.25] * 4
    arrivals = list(
        workloads.arrive(Random(5), workloads.poisson(Random(6), 1000.0), list("abcd"), 20 * SECOND, shares)
    )
    count = Counter(a.tenant for a in arrivals)
    assert all(a.time_ns < 20 * SECOND for a in arrivals)
    assert [count[t] / len(arrivals) for t in "abcd"] == pytest.approx(shares, abs=0.02)


def test_tenants_with_rates_of_their_own_are_merged():
    arrivals = list(workloads.arrive_apart(Random(7), 2.0, {"a": 900.0, "b": 100.0}, 10 * SECOND))
    assert [a.time_ns for a in arrivals] == sorted(a.time_ns for a in arrivals)
    count = Counter(a.tenant for a in arrivals)
    assert count["a"] == pytest.approx(9000, rel=0.1) and count["b"] == pytest.approx(1000, rel=0.2)


def test_bursts_are_of_several_tenants_at_once():
    names = [f"t{i}" for i in range(20)]
    options = {"every_s": 0.5, "size": 5, "share": 0.5, "width_ns": 1_000_000, "end_ns": 20 * SECOND}
    arrivals = list(workloads.merge(workloads.bursts(Random(8), names, **options)))
    assert [a.time_ns for a in arrivals] == sorted(a.time_ns for a in arrivals)
    assert 20 < len(arrivals) / (5 * 10) < 70  # 40 bursts, half of the tenants each
    assert min(gaps(a.time_ns for a in arrivals)) >= 0


def test_equal_seeds_give_equal_arrivals():
    def draw(seed: int) -> list[int]:
        return list(islice(workloads.mmpp(Random(seed), (10.0, 1000.0), (1.0, 1.0)), 1000))

    assert draw(1) == draw(1) != draw(2)


def test_recorded_times_are_read_and_scaled(tmp_path: Path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.0319600,3180,8\n"
        "2023-11-16 18:17:05,110,27\n"
    )
    times = workloads.read_csv(path)
    assert times == [0, 52_000_000, 1_020_040_000]
    assert workloads.read_csv(path, limit=2) == times[:2]
    assert workloads.scale(times, 2000.0) == [0, 50_978, SECOND // 1000]
    with pytest.raises(ValueError, match="1 arrivals have no rate"):
        workloads.scale([3], 1.0)
    path.write_text("when,what\n1,2\n")
    with pytest.raises(ValueError, match="must be called TIMESTAMP"):
        workloads.read_csv(path)


@pytest.mark.parametrize("cv", [0.5, 2.0, 4.0])
def test_processes_that_have_gone_on_for_long_have_their_rate_from_the_start(cv):
    """Begun with a gap, 2,000 uneven ones at 10 a second would have up to ten times as many arrivals in the first 10 ms
    as in any 10 ms later."""
    rates = {f"t{i}": 10.0 for i in range(2_000)}
    count = Counter(a.time_ns * 20 // SECOND for a in workloads.arrive_apart(Random(8), cv, rates, SECOND // 2))
    assert [count[i] for i in range(10)] == pytest.approx([1_000] * 10, rel=0.2 + 0.1 * cv)
