"""A host that stands still for milliseconds: whoever came meanwhile is served afterwards, as far as there is time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import pytest

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import Event, Submitted
from coalesce.scheduler.invariants import Checker
from coalesce.scheduler.machine import SerialHost, spread_out
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.run import Outcome, Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import arrive_apart

pytestmark = pytest.mark.once

US, MS = 1_000, 1_000_000
RUNS_US = {  # of eight ResNet-50 and eight BERT-base on an H200, by lanes
    0: {1: 414, 4: 749, 8: 972, 16: 1584},
    1: {1: 500, 4: 710, 8: 765, 16: 1330},
}
SLOS = (8_900 * US, 5_500 * US)
NAMES = [f"t{i}" for i in range(16)]
HOST_US = (4, 60, 250, 10, 200, 5)  # as SerialHost has them
EVERY, FIRST, UNTIL = 100 * MS, 200 * MS, 1_200 * MS


@dataclass(frozen=True)
class Pausing(SerialHost):
    """It stands still when it has decided, once every EVERY."""

    pause_ns: int = 0
    paused: list[int] = field(default_factory=list)  # when

    def decide(self, event: Event, commands: Sequence[Command]) -> int:
        usual_ns = super().decide(event, commands)
        if not isinstance(event, Submitted) or (now_ns := event.requests[-1].arrival_ns) < self.next_ns:
            return usual_ns
        self.paused.append(now_ns)
        return usual_ns + self.pause_ns

    @property
    def next_ns(self) -> int:
        return FIRST + EVERY * len(self.paused)


def serve(rate: float, pause_ns: int, seed: int) -> tuple[Run, Pausing]:
    numbers = iter(range(1 << 30))
    made = [
        Executable(next(numbers), (Entry(family, 0, width),), us * US, us * US * 11 // 10)
        for family, runs in RUNS_US.items()
        for width, us in runs.items()
    ]
    host = Pausing(Random(seed + 7), *(us * US for us in HOST_US), wake_ns=60 * US, spread=2.0, pause_ns=pause_ns)
    checker = Checker(depth=3)
    run = simulate(
        Coalescing(),
        [Tenant(name, (i % 2,), SLOS[i % 2]) for i, name in enumerate(NAMES)],
        Catalog(tuple(made)),
        arrive_apart(Random(seed), 1.0, dict.fromkeys(NAMES, rate / len(NAMES)), UNTIL),
        takes=lambda executable, rng: spread_out(executable.l50_ns, 1.1, rng),
        host=host,
        seed=seed,
        watchers=[checker.see],
    )
    assert checker.finish()[:5] == []
    return run, host


def lost(rate: float, pause_ns: int) -> float:
    """Requests that had no result in time, for each pause."""
    missed = paused = 0
    for seed in range(1, 6):
        run, host = serve(rate, pause_ns, seed)
        missed += sum(n for outcome, n in run.counts(None, FIRST - 10 * MS).items() if outcome is not Outcome.OK)
        paused += len(host.paused)
    assert paused == 50
    return missed / paused


@pytest.mark.parametrize(("pause_ms", "most"), [(0, 0.1), (3, 11), (4, 21), (6, 40)])
def test_who_came_during_a_pause_is_served_afterwards(pause_ms, most):
    """22 come within 3 ms, 30 within 4, and 44 within 6. By eight seeds 7, 16 and 33 are not served in time, where 14,
    31 and 51 were not while heads that were nearly late made runs narrow, which ruled out whoever came, and the host
    was believed to take as long for each of many as for one alone."""
    assert lost(7400.0, pause_ms * MS) <= most
