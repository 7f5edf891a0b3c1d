"""Where a program is cut into executables, by times alone: the best that there is, by hand and against every other."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, strategies as st

from coalesce.costs import Costs, DEVICES
from coalesce.costs.schedule import Stretch
from coalesce.passes.cuts import Point
from coalesce.passes.launch_cuts import choose_parts, SURE, Table

pytestmark = pytest.mark.once

COSTS = Costs(
    replace(DEVICES["H100"], dispatch_us=10.0, graph_us=1.0, single_us=5.0, pause_us=1.0, hand_us=0.5, argument_us=1.0)
)


def kernels(us: float, count: int = 1, graph: bool = True, at: int = 0) -> Stretch:
    device = COSTS.device
    return Stretch(at, us / SURE, count, count * (device.graph_us if graph else device.single_us), graph)


def everywhere(stretches: list[Stretch], live: int = 0) -> list[Point]:
    return [Point(at, live) for at in range(1, len(stretches))]


def run(stretches: list[Stretch], cuts: tuple[int, ...]) -> float:
    """A round, kernel by kernel: the host launches a graph, or a kernel outside of one, and the device what it has."""
    host = device = 0.0
    for at, own in enumerate(stretches):
        if at == 0 or at in cuts:
            host += COSTS.device.dispatch_us
            device += COSTS.device.pause_us if at else 0.0
        if at == 0 or at in cuts or not own.graph or not stretches[at - 1].graph:
            rest = stretches[at + 1 :]
            ends = (i for i, s in enumerate(rest, at + 1) if i in cuts or not s.graph or not own.graph)
            host += sum(s.launch_us for s in stretches[at : next(ends, len(stretches))])
            device = max(device, host)
        device += SURE * own.us
    return device


def test_the_second_is_launched_while_the_first_runs():
    """Ten kernels of 10 us: 20 us until they run, of which a cut after two leaves 12, and 1 between."""
    ten = [kernels(10.0) for _ in range(10)]
    assert run(ten, ()) == 10 + 10 + 100
    assert run(ten, (2,)) == 10 + 2 + 1 + 100
    chosen = choose_parts(ten, everywhere(ten), COSTS)
    assert chosen.cuts == (2,)
    assert chosen.why == (
        "2 executables of 2 and 8 kernels, each launched while those before it run, which is predicted to win 7 us a "
        "round; nothing is live between them"
    )


def test_a_short_program_is_not_cut():
    """The device would wait for the second call."""
    two = [kernels(4.0) for _ in range(2)]
    chosen = choose_parts(two, everywhere(two), COSTS)
    assert chosen[:2] == ((), "one executable: the host takes 2 us for its 0 arguments and the launch of its 2 kernels")
    assert choose_parts(two, everywhere(two), COSTS, executables=2).cuts == (1,)


def test_a_long_program_is_cut_into_parts_that_grow():
    """Of 400 kernels of 2 us: what is launched in 3 us more than a part runs is half as long again as that part."""
    many = [kernels(2.0) for _ in range(400)]
    chosen = choose_parts(many, everywhere(many), COSTS)
    bounds = [0, *chosen.cuts, 400]
    sizes = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    assert len(sizes) > 2 and sizes == sorted(sizes), sizes
    assert run(many, chosen.cuts) < 0.75 * run(many, ())


def test_arguments_take_time_before_anything_is_launched():
    """Of ten kernels the last one reads 40: while five run, these and a second call are not done yet, while six do."""
    ten = [*(kernels(10.0) for _ in range(9)), kernels(10.0)._replace(reads=40)]
    table = Table(ten, everywhere(ten), COSTS)
    assert table.best(1) == 10 + 10 + 40 + 100
    assert table.cuts(2) == (6,) and table.best(2) == 10 + 6 + 1 + 100
    assert 10 + 5 + 50 < 2 * 10 + 10 + 40 < 10 + 6 + 60


def test_no_more_than_the_host_can_launch():
    """Calls that take longer than the program: rounds that follow one another would wait for the host."""
    busy = [kernels(1.1) for _ in range(100)]
    assert choose_parts(busy, everywhere(busy), Costs(replace(COSTS.device, dispatch_us=30.0))).cuts == ()


def test_a_place_with_little_alive_is_better():
    ten = [kernels(10.0) for _ in range(10)]
    points = [Point(at, 1_000 if at == 3 else 50_000_000) for at in range(1, 10)]
    assert choose_parts(ten, points, COSTS).cuts == (3,)


def test_what_is_in_no_graph_ends_one():
    """A library's convolution early on: what is behind it is launched while it runs, and no cut wins anything."""
    broken = [kernels(10.0), kernels(40.0, graph=False), *(kernels(10.0) for _ in range(10))]
    assert choose_parts(broken, everywhere(broken), COSTS).cuts == ()
    whole = [in_a_graph(own) for own in broken]
    assert choose_parts(whole, everywhere(whole), COSTS).cuts != ()


def in_a_graph(own: Stretch) -> Stretch:
    return own._replace(graph=True, launch_us=own.kernels * COSTS.device.graph_us)


def test_as_many_as_are_asked_for_as_far_as_there_are_places():
    four = [kernels(1.0) for _ in range(4)]
    assert choose_parts(four, everywhere(four), COSTS, executables=1).cuts == ()
    assert len(choose_parts(four, everywhere(four), COSTS, executables=3).cuts) == 2
    assert choose_parts(four, everywhere(four), COSTS, executables=9).cuts == (1, 2, 3)
    assert choose_parts(four, [], COSTS, executables=9).cuts == ()
    assert choose_parts([], [], COSTS).cuts == ()


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9), st.booleans(), st.booleans()), min_size=1, max_size=7),
    st.integers(1, 4),
)
def test_no_other_cuts_are_better(drawn: list[tuple[int, int, bool, bool]], parts: int) -> None:
    own = [kernels(float(us), count, graph or not rare) for us, count, graph, rare in drawn]
    points = everywhere(own)
    parts = min(parts, len(own))
    table = Table(own, points, COSTS)
    best = min(run(own, cuts) for cuts in combinations(range(1, len(own)), parts - 1))
    assert table.best(parts) == pytest.approx(best)
    assert len(table.cuts(parts)) == parts - 1
    assert run(own, table.cuts(parts)) == pytest.approx(best)
