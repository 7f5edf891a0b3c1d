"""The packing problem: which operations to run together, and what that wins.

A node is an operation of one program. Nodes of one kind may share a pack, which runs them as one operation at the place
of one; a packing is a set of disjoint packs. Units are microseconds throughout.

    value(packs) = sum of gain(pack) + sum of bonus(pack), over the packs whose operands arrive stacked

Operands arrive stacked when an earlier pack has already computed them in one array: for every operand k, the k-th
feeders of the members are exactly the members of one chosen pack, in the same order (by program, then by number).

A packing can be run when contracting each pack to one vertex leaves the dependency graph without a cycle. That rules
out a pack with a path between two members, and also packs that are legal one by one and wait for each other: {a1, b2}
and {a2, b1} of the chains a1 -> a2 and b1 -> b2.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Pack = tuple[int, ...]  # sorted numbers of nodes


@dataclass(frozen=True)
class Node:
    """`feeders`: the nodes whose results, through light equations, are the operands, in operand order."""

    program: int
    kind: Hashable
    feeders: Pack | tuple[()]


@dataclass(frozen=True)
class Problem:
    """Nodes of all programs; those of one program are numbered in a topological order.

    Attributes:
      before: for each node, the nodes that must have run; programs need not be independent of each other
      gain: what a pack (sorted) wins when each operand has to be gathered; may be negative; None if it is illegal
      bonus: what it wins more if its operands arrive stacked; never negative
      within: whether nodes of one program may share a pack
    """

    nodes: tuple[Node, ...]
    before: tuple[tuple[int, ...], ...]
    gain: Callable[[Pack], float | None]
    bonus: Callable[[Pack], float]
    within: bool = False

    def __post_init__(self) -> None:
        assert len(self.nodes) == len(self.before), f"{len(self.nodes)} nodes, {len(self.before)} lists of predecessors"


def value(problem: Problem, packs: Iterable[Sequence[int]]) -> float:
    """What a packing wins.

    Raises:
      ValueError: one of the packs is illegal.
    """
    chosen = [tuple(sorted(pack)) for pack in packs]
    home = {node: by_program(problem, pack) for pack in chosen for node in pack}
    won: list[float] = []
    for pack in chosen:
        gain = problem.gain(pack)
        if gain is None:
            raise ValueError(f"nodes {pack} make no legal pack")
        won.append(gain)
        if arrives_stacked(problem, pack, home):
            won.append(problem.bonus(pack))
    return math.fsum(won)


def arrives_stacked(problem: Problem, pack: Sequence[int], home: dict[int, Pack]) -> bool:
    """Whether the operands of `pack` are the results of packs; `home` has the pack of each packed node, by program."""
    columns = [problem.nodes[node].feeders for node in by_program(problem, pack)]
    if not columns[0] or len({len(feeders) for feeders in columns}) > 1:
        return False
    return all(home.get(slot[0]) == slot for slot in zip(*columns, strict=True))


def by_program(problem: Problem, pack: Iterable[int]) -> Pack:
    """Members in the order of the rows of the stacked array."""
    return tuple(sorted(pack, key=lambda node: (problem.nodes[node].program, node)))


def is_schedulable(problem: Problem, packs: Iterable[Sequence[int]]) -> bool:
    """Whether an order exists in which each pack runs at once."""
    return schedule_order(problem, packs) is not None


def schedule_order(problem: Problem, packs: Iterable[Sequence[int]]) -> tuple[Pack, ...] | None:
    """All packs and the nodes outside them, in an order in which they can run; None if there is none.

    Of those that are ready, the one with the smallest first number runs next.
    """
    blocks: list[Pack] = [tuple(sorted(pack)) for pack in packs]
    packed = {node for block in blocks for node in block}
    assert len(packed) == sum(map(len, blocks)), f"packs overlap: {blocks}"
    blocks += [(node,) for node in range(len(problem.nodes)) if node not in packed]
    home = {node: b for b, block in enumerate(blocks) for node in block}
    waits = [{home[p] for node in block for p in problem.before[node]} for block in blocks]
    order = ranked_order(waits, blocks)
    return tuple(blocks[b] for b in order) if len(order) == len(blocks) else None


def ranked_order(waits: Sequence[set[int]], ranks: Sequence[Any]) -> list[int]:
    """The numbers of what can run, each after those it waits for; of those that are ready, the least in rank next."""
    readers: list[list[int]] = [[] for _ in waits]
    for i, needed in enumerate(waits):
        for earlier in needed:
            readers[earlier].append(i)
    missing = [len(needed) for needed in waits]
    ready = [(ranks[i], i) for i, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        _, i = heapq.heappop(ready)
        order.append(i)
        for reader in readers[i]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, (ranks[reader], reader))
    return order
