"""What requests take from runs, out of runs of which it is known."""

from itertools import takewhile
from random import Random

import pytest

from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.workloads import gamma
from experiments.sim_vs_real_stolen import disturbed_ns, Ran, Served, stolen_ns, taken_ns

pytestmark = pytest.mark.once
US = 1_000
EACH = 120 * US
END = 8_000_000 * US


def served(each_ns: int) -> tuple[Served, list[int]]:
    """Runs of two kinds one after the other, and what they would take by themselves; of a machine that is slow now and
    then, whatever is asked of it."""
    rng = Random(1)
    arrivals = list(takewhile(lambda time_ns: time_ns < END, gamma(rng, 600.0, 2.0)))
    ran: list[Ran] = []
    alone: list[int] = []
    at_ns = 0
    while at_ns < END:
        wide, slow = rng.random() < 0.3, 1.5 if at_ns // (200_000 * US) % 2 else 1.0
        alone.append(round((2_000 if wide else 700) * US * slow * rng.uniform(0.9, 1.1)))
        took_ns = alone[-1] + disturbed_ns(arrivals, each_ns, at_ns, alone[-1])
        ran.append(Ran((Entry(0, 0, 2 if wide else 1),), False, took_ns, at_ns))
        at_ns += took_ns + rng.randrange(300 * US)
    return Served(ran, arrivals), alone


def test_it_is_found_and_taken_back():
    found, alone = served(EACH)
    assert stolen_ns([found]) == pytest.approx(EACH, rel=0.15)
    assert [own.took_ns for own in found.undisturbed(EACH)] == alone != [own.took_ns for own in found.ran]


def test_long_runs_are_not_long_for_the_requests_that_come_meanwhile():
    found, alone = served(0)
    assert stolen_ns([found]) < EACH / 10
    assert [own.took_ns for own in found.ran] == alone


def test_nothing_is_found_where_nothing_came():
    ran = [Ran((Entry(0, 0, 1),), False, 100 + i, 200 * i) for i in range(20)]
    assert stolen_ns([]) == stolen_ns([Served(ran, [])]) == stolen_ns([Served([], [5])]) == 0
    assert Served(ran, []).undisturbed(7) == ran


def test_who_comes_because_a_run_is_longer_makes_it_longer_still():
    """Of 50 that one takes, all of who comes first; half of the time that the run goes on with who comes last."""
    arrivals = [50, 1040, 1090, 1200]
    assert disturbed_ns(arrivals, 50, 0, 900) == 50
    assert disturbed_ns(arrivals, 50, 0, 1000) == 50 + (1059 - 1040) // 2
    assert taken_ns(arrivals, 50, 0, 1059) == 59 and taken_ns(arrivals, 50, 60, 1200) == 50 + (1200 - 1140) // 2
    assert disturbed_ns(arrivals, 50, 0, 50) == 0 == disturbed_ns(arrivals, 0, 0, 1000)
