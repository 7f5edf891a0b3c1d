"""The bounds that experiments are plotted against, on numbers that can be checked by hand."""

import pytest
from hypothesis import given, strategies as st

from coalesce.scheduler.bounds import (
    best_rate,
    fused_rate,
    Linear,
    SECOND,
    shared_rate,
    staggered_rate,
    unfused_rate,
)

pytestmark = pytest.mark.once

MS = 1_000_000
SMALL = Linear(MS // 20, MS)  # 50 us a lane, 1 ms a run


def test_the_widest_run_in_time_bounds_the_rate():
    times = {1: 1 * MS, 2: MS * 3 // 2, 8: 4 * MS}
    assert best_rate(times, 10 * MS) == 2000  # 8 in 4 ms
    assert best_rate(times, 3 * MS) == pytest.approx(2 / 0.0015)
    assert best_rate(times, 1 * MS) == 1000
    assert best_rate(times, MS // 2) == 0


def test_a_wider_run_that_is_less_efficient_does_not_count():
    assert best_rate({1: MS, 2: 3 * MS}, 10 * MS) == 1000


def test_the_capacity_of_480_lanes_in_25_ms():
    assert best_rate(SMALL.times(range(1, 1000)), 25 * MS) == pytest.approx(19_200)


def test_staggered_devices_wait_for_less_of_a_run():
    times = {1: 1 * MS, 4: 2 * MS, 16: 4 * MS}
    assert staggered_rate(times, 4 * MS + 1, 1) == 2000  # twice 2 ms, and not twice 4
    assert staggered_rate(times, 6 * MS + 1, 2) == 2 * 4000
    assert staggered_rate(times, 4 * MS + 1, 1000) == 1000 * 2000
    assert staggered_rate(times, 4 * MS + 5000, 1000) == 1000 * 4000


@given(
    st.dictionaries(st.integers(1, 64), st.integers(1, 100 * MS), min_size=1),
    st.integers(1, 100 * MS),
    st.integers(1, 16),
)
def test_staggering_is_never_above_the_bound(times, slo_ns, devices):
    assert staggered_rate(times, slo_ns, devices) <= devices * best_rate(times, slo_ns) * (1 + 1e-12)


def test_kinds_that_share_a_device():
    assert shared_rate([1.0], [500.0]) == 500
    assert shared_rate([0.5, 0.5], [1000.0, 1000.0]) == 1000
    assert shared_rate([0.5, 0.5], [3000.0, 1000.0]) == 1500
    assert shared_rate([1.0, 0.0], [700.0, 0.0]) == 700
    assert shared_rate([0.5, 0.5], [700.0, 0.0]) == 0
    assert shared_rate([], []) == 0


def test_load_of_tenants_that_take_turns_and_of_tenants_that_are_fused():
    assert unfused_rate(SMALL, 9, 25 * MS) == pytest.approx(0.6 * SECOND / SMALL.alpha_ns)
    assert fused_rate(SMALL, 25 * MS) == pytest.approx(0.92 * SECOND / SMALL.alpha_ns)
    assert unfused_rate(SMALL, 24, 25 * MS) == 0
    assert unfused_rate(SMALL, 1000, 25 * MS) == 0


def test_one_tenant_gains_nothing_from_being_fused():
    assert unfused_rate(SMALL, 1, 25 * MS) == fused_rate(SMALL, 25 * MS)


@pytest.mark.parametrize("tenants, gain", [(5, 1.2), (10, 1.6), (20, 4.2)])
def test_what_fusing_gains_grows_with_the_tenants(tenants, gain):
    times, slo_ns = Linear(MS // 20, 37 * MS // 100), 10 * MS
    assert fused_rate(times, slo_ns) / unfused_rate(times, tenants, slo_ns) == pytest.approx(gain, rel=0.03)
