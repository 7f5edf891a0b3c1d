"""Random packing problems whose costs behave like a device's: launches, a roofline, padding, copies.

Programs are chains, series-parallel graphs or layered graphs; some are altered copies of others, as networks of one
lineage are. A kind is what a kernel can run together (the cluster), and its nodes have different shapes, so that a pack
pads its members to the largest. A pack saves launches, and shares what a small operation leaves idle; it pays for the
padding and for gathering its operands, which is free where they arrive stacked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coalesce.packing import Node, Problem

Edges = list[list[int]]  # for each node the earlier nodes that it reads
Shape = tuple[int, int, int]  # M, N, K of a matrix product


@dataclass(frozen=True)
class Costs:
    """Microseconds, bytes a microsecond, operations a microsecond; a pack may pad by at most `waste` of its work."""

    launch: float = 4.0
    copy: float = 1.5
    bandwidth: float = 100e3
    peak: float = 2e6
    waste: float = 0.75

    def alone(self, shape: Shape) -> float:
        return self.launch + self.run([shape])

    def run(self, shapes: Sequence[Shape]) -> float:
        moved = sum(4 * (m * n + n * k + m * k) for m, n, k in shapes)
        work = sum(2 * m * n * k for m, n, k in shapes)
        return max(moved / self.bandwidth, work / self.peak)

    def gather(self, shapes: Sequence[Shape]) -> float:
        return self.copy + 2 * sum(4 * m * k for m, _, k in shapes) / self.bandwidth

    def gain(self, shapes: Sequence[Shape]) -> float | None:
        largest: Shape = (max(s[0] for s in shapes), max(s[1] for s in shapes), max(s[2] for s in shapes))
        work = sum(m * n * k for m, n, k in shapes)
        padded = len(shapes) * largest[0] * largest[1] * largest[2]
        if padded > work / (1 - self.waste):
            return None
        together = self.launch + self.run([largest] * len(shapes)) + self.gather(shapes)
        return sum(self.alone(shape) for shape in shapes) - together


def chain(chance: random.Random, count: int) -> Edges:
    return [[i - 1] if i else [] for i in range(count)]


def series_parallel(chance: random.Random, count: int) -> Edges:
    """Blocks of one node, or of two or three branches; the first node behind the branches reads them all."""
    edges: Edges = []
    ends: list[int] = []
    while len(edges) < count:
        branches = chance.choice((1, 1, 2, 3))
        after: list[int] = []
        for _ in range(branches):
            last = ends
            for _ in range(chance.choice((1, 1, 2))):
                if len(edges) == count:
                    break
                edges.append(list(last))
                last = [len(edges) - 1]
            if last is not ends:
                after += last
        ends = after or ends
    return edges


def layered(chance: random.Random, count: int) -> Edges:
    """Layers of one to three nodes; each node reads one or two of the layer before."""
    edges: Edges = []
    before: list[int] = []
    while len(edges) < count:
        size = min(chance.randint(1, 3), count - len(edges))
        layer = list(range(len(edges), len(edges) + size))
        for _ in layer:
            edges.append(sorted(chance.sample(before, min(len(before), chance.choice((1, 1, 2))))))
        before = layer
    return edges


FORMS: tuple[Callable[[random.Random, int], Edges], ...] = (chain, series_parallel, layered)


def random_problem(
    seed: int,
    programs: tuple[int, int] = (2, 4),
    sizes: tuple[int, int] = (3, 8),
    kinds: int = 3,
    within: bool = False,
    forms: Sequence[Callable[[random.Random, int], Edges]] = FORMS,
) -> Problem:
    chance = random.Random(seed)
    costs = Costs(launch=chance.choice((2.0, 4.0, 8.0)), copy=chance.choice((1.0, 3.0, 6.0)))
    bases = [tuple(chance.choice((16, 32, 64, 96, 128)) for _ in range(3)) for _ in range(kinds)]
    drafts: list[tuple[Edges, list[int], list[Shape]]] = []
    for _ in range(chance.randint(*programs)):
        if drafts and chance.random() < 0.4:
            drafts.append(altered(chance, chance.choice(drafts), bases))
            continue
        edges = chance.choice(forms)(chance, chance.randint(*sizes))
        labels = [chance.randrange(kinds) for _ in edges]
        drafts.append((edges, labels, [shape_near(chance, bases[kind]) for kind in labels]))
    nodes: list[Node] = []
    before: list[tuple[int, ...]] = []
    shapes: list[Shape] = []
    for program, (edges, labels, own) in enumerate(drafts):
        base = len(nodes)
        for needed, kind in zip(edges, labels, strict=True):
            before.append(tuple(base + p for p in needed))
            nodes.append(Node(program, f"kind {kind}", before[-1]))
        shapes += own
    return Problem(
        tuple(nodes),
        tuple(before),
        lambda pack: costs.gain([shapes[i] for i in pack]),
        lambda pack: costs.gather([shapes[i] for i in pack]),
        within,
    )


def branches(problem: Problem) -> bool:
    """Whether any of the programs is no chain."""
    last: dict[int, int] = {}
    for i, node in enumerate(problem.nodes):
        if problem.before[i] != ((last[node.program],) if node.program in last else ()):
            return True
        last[node.program] = i
    return False


def shape_near(chance: random.Random, base: Sequence[int]) -> Shape:
    m, n, k = (max(8, int(size * chance.choice((0.5, 0.75, 1, 1, 1, 1.25, 1.5)))) for size in base)
    return m, n, k


def altered(
    chance: random.Random, draft: tuple[Edges, list[int], list[Shape]], bases: Sequence[Sequence[int]]
) -> tuple[Edges, list[int], list[Shape]]:
    """A copy with some nodes of another kind or shape."""
    edges, labels, shapes = draft
    labels, shapes = list(labels), list(shapes)
    for i in range(len(edges)):
        if chance.random() < 0.25:
            labels[i] = chance.randrange(len(bases))
            shapes[i] = shape_near(chance, bases[labels[i]])
    return edges, labels, shapes
