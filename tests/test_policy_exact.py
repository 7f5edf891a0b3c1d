"""The optimum that policies are held against, on instances that can be done by hand or by trying everything."""

from itertools import combinations, permutations
from random import Random

import pytest

from coalesce.scheduler.machine import Line
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.workloads import Arrival
from experiments.hindsight import most_in_time
from experiments.policy_exact import solve
from experiments.policy_instances import Instance, random_instance, US

pytestmark = pytest.mark.once

MS = 1000 * US


def instance_of(
    *arrivals: tuple[float, str], slos_ms: dict[str, float], widths: tuple[int, ...] = (1, 2, 4)
) -> Instance:
    """A run takes 1 ms and 1 ms a lane; tenants with a name of one letter are of one program, others of another."""
    tenants = tuple(Tenant(name, (len(name) - 1,), round(ms * MS)) for name, ms in slos_ms.items())
    lines = (Line(MS, MS), Line(MS, MS))
    return Instance(0, lines, tenants, tuple(Arrival(round(ms * MS), name) for ms, name in arrivals), 1.0, 1.0, widths)


def test_lanes_share_a_run_where_one_by_one_is_too_slow():
    four = [(0.0, "a")] * 4
    assert solve(instance_of(*four, slos_ms={"a": 5})).in_time == 4
    assert solve(instance_of(*four, slos_ms={"a": 4.9})).in_time == 2
    assert solve(instance_of(*four, slos_ms={"a": 5}, widths=(1,))).in_time == 2


def test_padding_takes_as_long_as_lanes():
    assert solve(instance_of((0.0, "a"), (0.0, "a"), (0.0, "a"), slos_ms={"a": 4.5}, widths=(1, 2, 4))).in_time == 2


def test_programs_do_not_share_a_run():
    assert solve(instance_of((0.0, "a"), (0.0, "bb"), slos_ms={"a": 3, "bb": 3})).in_time == 1
    assert solve(instance_of((0.0, "a"), (0.0, "bb"), slos_ms={"a": 2, "bb": 4})).in_time == 2


def test_it_knows_what_will_come_and_waits_for_it():
    # At 0.5 a urgent one comes: whoever has begun with the first by then is too late for it.
    assert solve(instance_of((0.0, "a"), (0.5, "bb"), slos_ms={"a": 5, "bb": 2.2})).in_time == 2


def test_the_solver_agrees_with_trying_everything():
    for seed in range(12):
        instance = random_instance(seed, requests=(4, 5))
        assert solve(instance).in_time == by_trying(instance), seed


def by_trying(instance: Instance) -> int:
    """Every way to choose requests, to share them out to runs, and to order the runs."""
    numbers = range(len(instance.arrivals))
    for count in range(len(numbers), 0, -1):
        for served in combinations(numbers, count):
            if any(can_be_done(instance, runs) for runs in partitions(list(served))):
                return count
    return 0


def partitions(items: list[int]):
    if not items:
        yield []
        return
    first, *others = items
    for rest in partitions(others):
        yield [[first], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], [first, *group], *rest[i + 1 :]]


def can_be_done(instance: Instance, runs: list[list[int]]) -> bool:
    if any(len({instance.family(instance.arrivals[i]) for i in run}) > 1 for run in runs):
        return False
    return any(in_time(instance, order) for order in permutations(runs))


def in_time(instance: Instance, runs: tuple[list[int], ...]) -> bool:
    free_ns = 0
    for run in runs:
        own = [instance.arrivals[i] for i in run]
        line = instance.lines[instance.family(own[0])]
        width = next((w for w in instance.widths if w >= len(own)), None)
        if width is None:
            return False
        free_ns = max(free_ns, max(a.time_ns for a in own)) + line.time(width)
        if free_ns > min(instance.deadline_ns(a) for a in own):
            return False
    return True


def test_what_a_policy_did_already_is_enough_where_it_is_everything():
    instance = random_instance(1)
    assert solve(instance, known=len(instance.arrivals), seconds=0).proven


@pytest.mark.parametrize("seed", range(20))
def test_instances_are_drawn_again_with_their_seed(seed):
    first, again = random_instance(seed), random_instance(seed)
    assert first == again and 10 <= len(first.arrivals) <= 30
    assert all(a.time_ns % US == 0 for a in first.arrivals)
    assert all(tenant.slo_ns % US == 0 for tenant in first.tenants)


@pytest.mark.parametrize("seed", range(6))
def test_hindsight_is_the_optimum_of_one_program_with_one_slo(seed):
    chance = Random(seed)
    arrivals = sorted(chance.choice((0, 0, 1, 2, 5)) + chance.randint(0, 8) * 2 for _ in range(7))
    one = instance_of(*((float(ms), "a") for ms in arrivals), slos_ms={"a": chance.choice((4, 5, 7))})
    slo_ns, times = one.tenants[0].slo_ns, {width: one.lines[0].time(width) for width in one.widths}
    found = most_in_time([arrival.time_ns for arrival in one.arrivals], slo_ns, times)
    assert found == solve(one, seconds=20.0).in_time
