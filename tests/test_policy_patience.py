"""Waiting for company while the device is idle: where it mostly comes, and not where callers wait for their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from statistics import median

import pytest

from coalesce.scheduler import patience
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command, Dispatch, WakeAt
from coalesce.scheduler.events import CatalogChanged, Completed, Event, Submitted, TenantAdded, Timer
from coalesce.scheduler.request import Request
from coalesce.scheduler.simulator import simulate
from tests.simulated import catalog, LINE, MS, steady, tenants

pytestmark = pytest.mark.once

NAMES = [f"t{i}" for i in range(8)]
HOST_NS = 20_000  # from the end of a bundle until callers ask again
in_segments = pytest.mark.parametrize("segments", [1, 3])


class Loop:
    """Callers that ask again once they have a result: `ended(caller, now)` says for whom, and when."""

    def __init__(self, segments: int, ended: Callable[[int, int], None]) -> None:
        self._policy, self._ended, self._last = Coalescing(), ended, segments - 1
        self._made = catalog(segments=segments, spread=1.0)
        self._heap: list[tuple[int, int, Event]] = []
        self._lanes: dict[int, Dispatch] = {}
        self._callers: list[int] = []
        self._serial, self._free_ns, self._wake_ns = 0, 0, 1 << 62
        self._tell(CatalogChanged(self._made), 0)
        for tenant in tenants(8, slo_ns=1000 * MS):
            self._tell(TenantAdded(tenant), 0)

    def ask(self, callers: Sequence[int], at_ns: int) -> None:
        """All at once."""
        numbers = range(len(self._callers), len(self._callers) + len(callers))
        self._callers += callers
        asked = (Request(i, NAMES[i % 8], 0, at_ns, at_ns + 1000 * MS) for i in numbers)
        self._happen(Submitted(tuple(asked)), at_ns)

    def go(self, requests: int) -> int:
        """Until so many have ended; returns when that was."""
        now_ns = 0
        while requests > 0:
            if self._wake_ns < self._heap[0][0] if self._heap else True:
                now_ns = self._wake_ns
                self._tell(Timer(), now_ns)
                continue
            now_ns, _, event = heappop(self._heap)
            self._tell(event, now_ns)
            if isinstance(event, Completed):
                requests -= self._finish(event, now_ns)
        return now_ns

    def _finish(self, event: Completed, now_ns: int) -> int:
        dispatch = self._lanes.pop(event.bundle)
        if self._made.by_id[dispatch.executable].entries[0].segment < self._last:
            return 0
        for number in dispatch.lanes[0]:
            self._ended(self._callers[number], now_ns)
        return len(dispatch.lanes[0])

    def _happen(self, event: Event, at_ns: int) -> None:
        self._serial += 1
        heappush(self._heap, (at_ns, self._serial, event))

    def _tell(self, event: Event, now_ns: int) -> None:
        self._wake_ns = 1 << 62
        for command in self._policy.on_event(event, now_ns):
            self._do(command, now_ns)

    def _do(self, command: Command, now_ns: int) -> None:
        if isinstance(command, WakeAt):
            self._wake_ns = command.time_ns
            return
        assert isinstance(command, Dispatch), f"{command}"
        start_ns = max(self._free_ns, now_ns)
        self._free_ns = start_ns + self._made.by_id[command.executable].l50_ns
        self._lanes[command.bundle] = command
        self._happen(Completed(command.bundle, start_ns, self._free_ns), self._free_ns)


@in_segments
@pytest.mark.parametrize("lone", [1, 3])
def test_a_lone_request_goes_at_once_though_many_came_together_before_it(segments, lone):
    """Sixteen at once, then some one after another, each when the one before has its result; and so on."""
    took_ns: list[int] = []
    ends_ns: list[int] = []
    loop = Loop(segments, lambda caller, now_ns: ends_ns.append(now_ns))
    now_ns = 1
    for _ in range(20):
        for count in (16, *[1] * lone):
            loop.ask(range(count), now_ns)
            took = loop.go(count) - now_ns
            took_ns += [took] if count == 1 else []
            now_ns += took + HOST_NS
    assert median(took_ns) <= 1.01 * LINE.time(1)


@in_segments
@pytest.mark.parametrize("callers", [1, 4, 16])
@pytest.mark.parametrize("spread_ns", [0, 50_000])
def test_callers_that_wait_for_results_are_served_as_often_as_if_all_company_was_waited_for(
    monkeypatch, segments, callers, spread_ns
):
    def requests_in(odds: float) -> float:
        monkeypatch.setattr(patience, "GOOD_ODDS", odds)
        again: list[int] = []

        def ended(caller: int, now_ns: int) -> None:
            loop.ask([caller], now_ns + HOST_NS + spread_ns * len(again) % 400_000)
            again.append(caller)

        loop = Loop(segments, ended)
        loop.ask(range(callers), 1)
        return 300 / loop.go(300)

    usual = patience.GOOD_ODDS
    assert requests_in(usual) >= 0.99 * requests_in(0.0)


@in_segments
@pytest.mark.parametrize("rate", [300.0, 1000.0])
def test_company_that_comes_is_waited_for_as_ever(monkeypatch, segments, rate):
    def busy_ns(odds: float) -> int:
        monkeypatch.setattr(patience, "GOOD_ODDS", odds)
        return simulate(Coalescing(), tenants(8), catalog(segments=segments), steady(rate, 400 * MS, NAMES)).busy_ns

    usual = patience.GOOD_ODDS
    assert busy_ns(usual) <= 1.02 * busy_ns(0.0)
