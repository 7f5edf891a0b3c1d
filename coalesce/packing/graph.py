"""A problem prepared for search: programs in a canonical order, small integers, look-ups, remembered gains.

Nodes are renumbered program by program, so that a sorted pack is also in the order in which operands stack. Programs
are sorted by their form alone, hence a caller who lists the same programs in another order gets the same search.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

from coalesce.packing.problem import Pack, Problem

ILLEGAL = -math.inf


class Graph:
    """Attributes, all by the new number of a node:

    program, kind: small integers
    feeders, before, after: nodes; `readers` are the nodes that have it as a feeder
    place: how far along its program it stands, 0 for the first nodes and 1 for the last
    number: the caller's number
    gains: what the caller was asked for
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.within = problem.within
        count = len(problem.nodes)
        programs = programs_in_order(problem)
        self.number = [node for nodes in programs for node in nodes]
        new = [0] * count
        for i, node in enumerate(self.number):
            new[node] = i
        nodes = [problem.nodes[node] for node in self.number]
        kinds: dict[object, int] = {}
        self.program = [p for p, nodes_of in enumerate(programs) for _ in nodes_of]
        self.programs = [[new[node] for node in nodes_of] for nodes_of in programs]
        self.kind = [kinds.setdefault(node.kind, len(kinds)) for node in nodes]
        self.feeders = [tuple(new[f] for f in node.feeders) for node in nodes]
        self.before = [tuple(sorted({new[p] for p in problem.before[node]})) for node in self.number]
        self.after = inverse(self.before)
        self.readers = inverse([tuple(sorted(set(f))) for f in self.feeders])
        self.place = places(self.before, self.after)
        self.of_kind: dict[tuple[int, int], list[int]] = defaultdict(list)  # (kind, program): nodes by place
        for i in sorted(range(count), key=lambda i: (self.place[i], i)):
            self.of_kind[self.kind[i], self.program[i]].append(i)
        self.gains: dict[Pack, float] = {}
        self._sources: dict[Pack, tuple[Pack, ...]] = {}
        self._bonuses: dict[Pack, float] = {}

    def gain(self, pack: Pack) -> float:
        """Of a sorted pack of one kind; `ILLEGAL` where the caller says None."""
        found = self.gains.get(pack)
        if found is None:
            answer = self.problem.gain(self.numbers(pack))
            found = self.gains[pack] = ILLEGAL if answer is None else answer
        return found

    def sources(self, pack: Pack) -> tuple[Pack, ...]:
        """The packs that have to be chosen for the operands to arrive stacked, one for each operand; () if none do."""
        found = self._sources.get(pack)
        if found is None:
            columns = [self.feeders[i] for i in pack]
            same = len({len(column) for column in columns}) == 1
            found = self._sources[pack] = tuple(zip(*columns, strict=True)) if same else ()
        return found

    def bonus(self, pack: Pack) -> float:
        found = self._bonuses.get(pack)
        if found is None:
            found = self._bonuses[pack] = self.problem.bonus(self.numbers(pack))
        return found

    def numbers(self, pack: Pack) -> Pack:
        return tuple(sorted([self.number[i] for i in pack]))

    def partners(self, node: int, most: int) -> list[int]:
        """Nodes that may share a pack with a node: up to `most` of each program."""
        own = self.program[node]
        return [j for p in range(len(self.programs)) if self.within or p != own for j in self.near(node, p, most)]

    def near(self, node: int, program: int, most: int) -> list[int]:
        """Up to `most` nodes of a program that are of the kind of `node`, the nearest place first."""
        same = self.of_kind.get((self.kind[node], program), [])
        at = bisect_left(same, self.place[node], key=self.place.__getitem__)
        around = [i for i in same[max(at - most, 0) : at + most] if i != node]
        return sorted(around, key=lambda i: (abs(self.place[i] - self.place[node]), i))[:most]


def programs_in_order(problem: Problem) -> list[list[int]]:
    """The nodes of each program; programs sorted by length, then by what their nodes look like without their names."""
    programs: dict[int, list[int]] = defaultdict(list)
    members: dict[object, int] = defaultdict(int)
    for i, node in enumerate(problem.nodes):
        programs[node.program].append(i)
        members[node.kind] += 1

    def form(nodes: Sequence[int]) -> tuple:
        at = {node: k for k, node in enumerate(nodes)}
        looks = [
            (members[problem.nodes[i].kind], len(problem.nodes[i].feeders), *(at.get(p, -1) for p in problem.before[i]))
            for i in nodes
        ]
        return -len(nodes), looks

    return sorted(programs.values(), key=form)


def inverse(edges: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    found: list[list[int]] = [[] for _ in edges]
    for i, ends in enumerate(edges):
        for end in ends:
            found[end].append(i)
    return [tuple(starts) for starts in found]


def places(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> list[float]:
    """Depth / (depth + height), where both count the nodes of the longest path."""
    order = sorted_topologically(before, after)
    depth, height = [0] * len(order), [0] * len(order)
    for i in order:
        depth[i] = max((depth[p] + 1 for p in before[i]), default=0)
    for i in reversed(order):
        height[i] = max((height[s] + 1 for s in after[i]), default=0)
    return [depth[i] / max(depth[i] + height[i], 1) for i in range(len(order))]


def sorted_topologically(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> list[int]:
    missing = [len(needed) for needed in before]
    order = [i for i, n in enumerate(missing) if not n]
    for i in order:
        for reader in after[i]:
            missing[reader] -= 1
            if not missing[reader]:
                order.append(reader)
    assert len(order) == len(before), "the dependency graph has a cycle"
    return order
