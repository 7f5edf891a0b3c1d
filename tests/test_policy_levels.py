"""Many priorities at once: who takes the time for one, or a score, has as many as requests."""

import sys
from collections import Counter
from random import Random
from types import FrameType
from typing import Any

import pytest

from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command, Dispatch
from coalesce.scheduler.demand import Work
from coalesce.scheduler.events import CatalogChanged, Completed, Event, Submitted, TenantAdded
from coalesce.scheduler.lanes import Level
from coalesce.scheduler.levels import BAND, Levels
from coalesce.scheduler.request import Request, Tenant
from coalesce.scheduler.workloads import Arrival
from tests.simulated import catalog, checked, MS, tenants

pytestmark = pytest.mark.once


class Calls:
    """How many functions of Python's are called meanwhile."""

    def __enter__(self) -> "Calls":
        self.count, self._before = 0, sys.getprofile()
        sys.setprofile(self._see)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(self._before)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        self.count += event == "call"


def calls(priorities: list[int]) -> tuple[int, int]:
    """For as many requests that come at once, and for one more of a priority of its own when these are done."""
    policy, now_ns = Coalescing(), 0
    policy.on_event(CatalogChanged(catalog()), 0)
    policy.on_event(TenantAdded(Tenant("a", (0,), 10_000 * MS, quota=100_000)), 0)
    asked = tuple(Request(i, "a", 0, 0, 10_000 * MS, own) for i, own in enumerate(priorities))
    with Calls() as many:
        flying = dispatched(policy, Submitted(asked), 0)
    while flying:
        first, now_ns = flying.pop(0), now_ns + 2 * MS
        flying += dispatched(policy, Completed(first.bundle, now_ns - MS, now_ns), now_ns)
    assert policy.waiting == 0
    with Calls() as one:
        dispatched(policy, Submitted((Request(len(asked), "a", 0, now_ns, now_ns + 100 * MS, -1),)), now_ns)
    return many.count, one.count


def dispatched(policy: Coalescing, event: Event, now_ns: int) -> list[Dispatch]:
    commands: list[Command] = [*policy.on_event(event, now_ns)]
    return [command for command in commands if isinstance(command, Dispatch)]


@pytest.mark.inside
def test_a_priority_more_takes_no_longer_for_those_that_there_are():
    ascending = list(range(320))
    few, one = calls(ascending[:80])
    many, one_later = calls(ascending)
    assert many < 1.5 * 4 * few
    assert one_later < 1.5 * one


def test_the_highest_of_many_priorities_goes_first():
    order = Random(1).sample(range(200), 200)
    arrivals = [Arrival(0, "t0", 1000 * MS, priority=own) for own in order]
    run = checked(tenants(1), catalog(widths=(1, 2)), arrivals, keep_log=True)
    lanes = [i for _, _, commands in run.log for c in commands if isinstance(c, Dispatch) for (i,) in c.lanes]
    assert [order[i] for i in lanes] == sorted(order, reverse=True)


@pytest.mark.inside
@pytest.mark.parametrize("seed", range(5))
def test_each_level_counts_what_is_promised_in_it_and_above(seed):
    """However they come and go."""
    rng, levels = Random(seed), Levels()
    promised: dict[int, Work] = {}
    most = 0
    for _ in range(600):
        priority, bucket = rng.randrange(300), rng.randrange(10)
        levels.get(priority).promise(bucket, 7)
        promised.setdefault(priority, Work()).add(bucket, 7)
        if rng.random() < 0.01:
            gone = {own for own in promised if rng.random() < 0.5}
            for own in gone:
                for at, work_ns in promised.pop(own).by_bucket.items():
                    levels.get(own).release(at, work_ns)
            levels.keep(promised.keys())
        if rng.random() < 0.05:
            check(levels, promised)
            most = max(most, len(levels.all))
    assert most > 2 * BAND


def check(levels: Levels, promised: dict[int, Work]) -> None:
    above: Counter[int] = Counter()
    for level in levels.all:
        if level.priority in promised:
            above.update(promised[level.priority].by_bucket)
        exact = [sum(above[at] for at in range(bucket + 1)) for bucket in range(10)]
        assert all(at_worst >= ns for at_worst, ns in zip(before(level), exact, strict=True))
        level.demand.sum_up()
        assert before(level) == exact
        assert len(level.counted) <= BAND and len(level.counted) + len(level.below) <= BAND + len(levels.all) // 4


def before(level: Level) -> list[int]:
    return [level.demand.around(bucket).before_ns for bucket in range(10)]
