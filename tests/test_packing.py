"""coalesce.packing: legal packings, exact on two chains, near the optimum elsewhere, the same whenever it is asked."""

from dataclasses import replace
from itertools import combinations
from statistics import mean

import pytest
from hypothesis import given, settings, strategies as st

from coalesce.packing import align, Node, Packing, Problem
from coalesce.packing.problem import value
from experiments.packing_exact import solve
from experiments.packing_instances import branches, chain, random_problem

pytestmark = pytest.mark.once

SEEDS = range(24)


def chains(seed: int) -> Problem:
    """Two programs without branches."""
    return random_problem(seed, programs=(2, 2), sizes=(1, 7), forms=(chain,))


def assert_legal(problem: Problem, packing: Packing) -> None:
    """Checked by searching paths, independently of what the search keeps."""
    members = [i for pack in packing.packs for i in pack]
    assert len(members) == len(set(members))
    for pack in packing.packs:
        assert len(pack) > 1 and len({problem.nodes[i].kind for i in pack}) == 1
        assert problem.within or len({problem.nodes[i].program for i in pack}) == len(pack)
        assert problem.gain(pack) is not None
    home = {i: pack for pack in packing.packs for i in pack}
    block = [home.get(i, (i,)) for i in range(len(problem.nodes))]
    edges = {(block[p], block[i]) for i, needed in enumerate(problem.before) for p in needed}
    assert all(a != b for a, b in edges), "a pack depends on itself"
    blocks = set(block)
    while blocks:
        free = {b for b in blocks if not any(after == b and before in blocks for before, after in edges)}
        assert free, "packs wait for each other"
        blocks -= free


@pytest.mark.parametrize("within", [False, True])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=8)
def test_every_packing_is_legal_and_worth_what_it_says(seed: int, within: bool) -> None:
    problem = random_problem(seed, programs=(2, 3), sizes=(3, 5), within=within)
    packing = align(problem)
    assert_legal(problem, packing)
    assert packing.value == pytest.approx(value(problem, packing.packs))
    assert packing.value >= 0
    assert align(problem) == packing


@given(seed=st.integers(0, 10**6))
@settings(max_examples=8)
def test_two_chains_are_packed_as_well_as_can_be(seed: int) -> None:
    problem = chains(seed)
    best = solve(problem)
    assert best.proven
    assert align(problem).value == pytest.approx(best.value, abs=1e-3)


def test_branching_programs_are_packed_nearly_as_well_as_can_be() -> None:
    """The bounds of experiments/packing_regret.py, on fewer instances: chains alone are no part of either."""
    shares = []
    for seed in SEEDS:
        problem = random_problem(seed)
        if not branches(problem):
            continue
        best = solve(problem)
        assert best.proven
        if best.value > 1e-6:
            shares.append(align(problem).value / best.value)
    assert len(shares) > 14
    assert mean(shares) >= 0.95
    assert min(shares) >= 0.8
    assert max(shares) <= 1 + 1e-4


@given(seed=st.integers(0, 10**6), order=st.randoms(use_true_random=False))
@settings(max_examples=5)
def test_programs_listed_in_another_order_win_as_much(seed: int, order) -> None:
    """Nearly: programs that look the same may be told apart by their order alone. Of the 400 first seeds all but two
    win the same, one of them 1% more and the other one 3% less."""
    problem = random_problem(seed)
    programs = sorted({node.program for node in problem.nodes})
    order.shuffle(programs)
    listed = [i for p in programs for i, node in enumerate(problem.nodes) if node.program == p]
    new = {old: i for i, old in enumerate(listed)}
    nodes = tuple(replace(problem.nodes[i], feeders=tuple(new[f] for f in problem.nodes[i].feeders)) for i in listed)
    before = tuple(tuple(new[p] for p in problem.before[i]) for i in listed)

    def old_names(pack: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(listed[i] for i in pack))

    shuffled = Problem(nodes, before, lambda p: problem.gain(old_names(p)), lambda p: problem.bonus(old_names(p)))
    straight, turned = align(problem), align(shuffled)
    assert_legal(shuffled, turned)
    assert turned.value >= 0.95 * straight.value - 1e-6


def pair(gain: float, bonus: float = 0.0, feeders: bool = False) -> Problem:
    """Chains a0 -> a1 and b0 -> b1 of one kind."""
    nodes = tuple(Node(i // 2, "kind", (i - 1,) if feeders and i % 2 else ()) for i in range(4))
    before = ((), (0,), (), (2,))
    return Problem(nodes, before, lambda pack: gain if len(pack) == 2 else None, lambda pack: bonus)


def test_chains_never_cross() -> None:
    assert align(pair(1.0)).packs == ((0, 2), (1, 3))


def test_what_loses_is_left_alone() -> None:
    assert align(pair(-1.0)) == Packing((), 0.0)


def test_operands_that_arrive_stacked_can_make_a_losing_pack_win() -> None:
    problem = pair(-1.0, bonus=3.0, feeders=True)
    assert align(problem) == Packing(((0, 2), (1, 3)), 1.0)


def test_a_pack_may_feed_itself() -> None:
    """As in a loop, whose body reads what its last step has left."""
    nodes = (Node(0, "kind", (0,)), Node(1, "kind", (1,)))
    problem = Problem(nodes, ((), ()), lambda pack: -1.0, lambda pack: 3.0)
    assert align(problem) == Packing(((0, 1),), 2.0)


def test_no_programs() -> None:
    assert align(Problem((), (), lambda pack: 1.0, lambda pack: 0.0)) == Packing((), 0.0)


@pytest.mark.parametrize(
    "length", [15, 30, *(pytest.param(n, marks=pytest.mark.slow) for n in (60, 120, 240))], ids=str
)
def test_gain_is_asked_about_as_often_as_there_are_nodes(length: int) -> None:
    """Linear: a node of eight programs costs no more questions, however long they are. It costs 56 to 80 from 30 on."""
    problem = random_problem(7, programs=(8, 8), sizes=(length, length))
    packs: set[tuple[int, ...]] = set()

    def gain(pack: tuple[int, ...]) -> float | None:
        packs.add(pack)
        return problem.gain(pack)

    align(replace(problem, gain=gain))
    assert len(packs) <= 85 * len(problem.nodes)


def test_the_optimum_is_what_trying_all_finds() -> None:
    """The reference itself, on instances small enough to try every set of packs."""
    for seed in range(4):
        problem = random_problem(seed, programs=(2, 2), sizes=(2, 3))
        pairs = [
            p for p in combinations(range(len(problem.nodes)), 2)
            if problem.nodes[p[0]].program != problem.nodes[p[1]].program
            and problem.nodes[p[0]].kind == problem.nodes[p[1]].kind
            and problem.gain(p) is not None
        ]  # fmt: skip
        best = 0.0
        for count in range(1, 4):
            for packs in combinations(pairs, count):
                if len({i for p in packs for i in p}) == 2 * count and schedulable(problem, packs):
                    best = max(best, value(problem, packs))
        assert solve(problem).value == pytest.approx(best, abs=1e-3)


def schedulable(problem: Problem, packs) -> bool:
    try:
        assert_legal(problem, Packing(tuple(packs), 0.0))
    except AssertionError:
        return False
    return True
