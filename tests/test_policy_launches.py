"""Launching a bundle takes the host a while: the next one is decided on so early that the device need not wait."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from coalesce.scheduler.baselines.fifo import Fifo
from coalesce.scheduler.baselines.symphony import Symphony
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.events import Completed
from coalesce.scheduler.flight import Flight, LAUNCHES
from coalesce.scheduler.machine import Host
from coalesce.scheduler.simulator import simulate
from tests.simulated import capacity, catalog, MS, steady, tenants

pytestmark = pytest.mark.once

class Bundle(NamedTuple):
    id: int
    l50_ns: int


NAMES = [f"t{i}" for i in range(16)]


@pytest.mark.parametrize("make", [Coalescing, Symphony, Fifo])
def test_the_device_has_its_next_bundle_when_it_is_free(make):
    """As busy as with a host that takes no time, all policies alike."""
    busy = []
    for launch_ns in (0, MS):
        arrivals = steady(2 * capacity(), 400 * MS, NAMES)
        run = simulate(make(), tenants(16), catalog(), arrivals, host=Host(dispatch_ns=launch_ns))
        busy.append(run.busy_ns / run.end_ns)
    assert busy[0] > 0.98 and busy[1] > 0.95


def test_how_long_a_launch_takes_is_learnt_and_forgotten():
    flight = Flight[Bundle](200)

    def run(number: int, host_ns: int) -> None:
        flight.add(Bundle(number, 10), 0)
        flight.complete(Completed(number, 0, 10, False, host_ns))

    for number in range(8):
        run(number, 1000)
    assert flight.lead_ns == 1200
    run(8, 1_000_000)
    assert flight.lead_ns == 1200, "one that took long is none of three in four"
    for number in range(9, 9 + LAUNCHES):
        run(number, 50)
    assert flight.lead_ns == 250
