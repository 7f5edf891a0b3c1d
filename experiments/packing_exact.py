"""The best packing of a small problem, by integer programming: what `coalesce.packing.align` is held against."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from ortools.sat.python import cp_model

from coalesce.packing.problem import by_program, Pack, Problem, value

SCALE = 1000  # the solver counts in whole nanoseconds


@dataclass(frozen=True)
class Optimum:
    """`proven` is False where the time limit ended the search; `value` is then a lower bound."""

    packs: tuple[Pack, ...]
    value: float
    proven: bool


def candidates(problem: Problem) -> Iterator[Pack]:
    """Every set of two and more nodes of one kind, one of each program unless `within`."""
    kinds: dict[object, list[int]] = defaultdict(list)
    for i, node in enumerate(problem.nodes):
        kinds[node.kind].append(i)
    for nodes in kinds.values():
        for size in range(2, len(nodes) + 1):
            for pack in combinations(nodes, size):
                if problem.within or len({problem.nodes[i].program for i in pack}) == size:
                    yield pack


def solve(problem: Problem, seconds: float = 60.0) -> Optimum:
    """A binary for every legal pack and every bonus; equal times for the members of a chosen pack.

    A dependency takes the later time at least one step on. Times that fit exist exactly if the packs make no cycle.
    """
    gains = {pack: gain for pack in candidates(problem) if (gain := problem.gain(pack)) is not None}
    model = cp_model.CpModel()
    count = len(problem.nodes)
    time = [model.new_int_var(0, count, f"time {i}") for i in range(count)]
    for i, needed in enumerate(problem.before):
        for p in needed:
            model.add(time[i] >= time[p] + 1)
    chosen = {pack: model.new_bool_var(f"pack {pack}") for pack in gains}
    packs_of: dict[int, list[Pack]] = defaultdict(list)
    for pack, variable in chosen.items():
        for i in pack:
            packs_of[i].append(pack)
        for a, b in zip(pack, pack[1:], strict=False):
            model.add(time[a] == time[b]).only_enforce_if(variable)
    for packs in packs_of.values():
        model.add_at_most_one(chosen[pack] for pack in packs)
    terms = [round(SCALE * gain) * chosen[pack] for pack, gain in gains.items()]
    for pack in gains:
        columns = [problem.nodes[i].feeders for i in by_program(problem, pack)]
        if not columns[0] or len({len(feeders) for feeders in columns}) > 1:
            continue
        slots = set(zip(*columns, strict=True))
        sources = {slot: tuple(sorted(slot)) for slot in slots}
        if any(source not in gains or by_program(problem, source) != slot for slot, source in sources.items()):
            continue
        stacked = model.new_bool_var(f"stacked {pack}")
        for needed in (pack, *sources.values()):
            model.add_implication(stacked, chosen[needed])
        terms.append(round(SCALE * problem.bonus(pack)) * stacked)
    model.maximize(sum(terms))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Optimum((), 0.0, False)
    packs = tuple(sorted(pack for pack, variable in chosen.items() if solver.value(variable)))
    return Optimum(packs, value(problem, packs) if packs else math.fsum([]), status == cp_model.OPTIMAL)
