"""`align`: choose packs so that the programs win most by running them.

Programs are aligned one after another by a dynamic program (progressive.py, chain.py), which is exact for two chains;
then annealing (anneal.py) mends what a linear order of branching programs, and one program after another, cost. Time
grows with the number of nodes: a node is considered with a bounded number of partners, in a bounded number of steps.
Everything counts operations and nothing reads a clock, so the same problem gives the same packing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean

from coalesce.packing.anneal import anneal, LEAST
from coalesce.packing.graph import Graph, ILLEGAL
from coalesce.packing.problem import Pack, Problem
from coalesce.packing.progressive import align_programs
from coalesce.packing.state import State

SMALL = 100  # nodes up to which a node has many partners, and two searches are made
RUNS, PARTNERS = (2, 1), (64, 4)  # of small problems, and of others
STEPS_A_PAIR, STEPS_A_NODE = 100, 60


@dataclass(frozen=True)
class Packing:
    """`packs` of two nodes and more, sorted; every other node runs alone. `value` is what they win."""

    packs: tuple[Pack, ...]
    value: float


def align(problem: Problem) -> Packing:
    graph = Graph(problem)
    count = len(graph.number)
    large = count > SMALL
    partners = [graph.partners(i, PARTNERS[large]) for i in range(count)]
    pairs = sum(map(len, partners)) // 2
    if not pairs:
        return Packing((), 0.0)
    best: State | None = None
    for run in range(RUNS[large]):
        state = State(graph)
        align_programs(state, hope=float(run))
        gains = [abs(gain) for gain in graph.gains.values() if gain != ILLEGAL]
        if gains and any(gains):
            # A large problem is nearly done when it is aligned; heat would only undo that.
            hot, cold = (0.2, 0.01) if large else (1.0, 0.1)
            steps = min(STEPS_A_PAIR * pairs, 5000 + STEPS_A_NODE * count)
            anneal(state, partners, steps, mean(gains) * hot, mean(gains) * cold, seed=run)
        if best is None or state.value > best.value + LEAST:
            best = state
    assert best is not None, "no search was made"
    if best.value <= 0:
        return Packing((), 0.0)
    packs = sorted(graph.numbers(pack) for pack in best.worth)
    return Packing(tuple(packs), math.fsum(best.worth[p] for p in best.worth))
