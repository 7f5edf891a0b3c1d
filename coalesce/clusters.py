"""Clusters: heavy ops of any program whose matrix products are so near in shape that they may share a kernel.

    Gemm       what an op asks of a kernel: its dims, dtypes, precision, and a form for what is no plain product
    Cluster    ops that differ in (M, N, K) alone, and the one shape that all of them can be padded to

Padded to its cluster's shape, no op wastes more than the bound: waste = 1 - mnk / MNK. Batch dimensions are problems of
their own and are never padded. This is figure 7 of the paper (Jain et al. 2019, arXiv 1901.10008), with convolutions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import combinations, count
from math import prod
from typing import Any

from coalesce.errors import PlanError
from coalesce.heavy import HeavyOp
from coalesce.text import value

Shape = tuple[int, int, int]  # M, N, K
Form = tuple[Hashable, ...]

PRODUCT: Form = ("product",)

# Of all models here, many more ops share a cluster with another architecture's at 35% than at 30%, where BERT's 128
# tokens and ViT's 197 patches meet; the next step is at 50%, and pads twice as much.
WASTE_BOUND = 0.4


@dataclass(frozen=True)
class Gemm:
    """`batch` products [m, k] x [k, n]. Ops of equal `kind` may share a kernel once they are padded to one shape."""

    batch: int
    m: int
    n: int
    k: int
    lhs: str  # dtypes by name
    rhs: str
    out: str  # what preferred_element_type names, so the type of the accumulation too
    precision: Hashable
    context: Hashable
    form: Form

    @property
    def shape(self) -> Shape:
        return self.m, self.n, self.k

    @property
    def kind(self) -> tuple[str, str, str, Hashable, Hashable, Form]:
        """All that padding cannot make equal."""
        return self.lhs, self.rhs, self.out, self.precision, self.context, self.form


def canonical_gemm(op: HeavyOp) -> Gemm:
    types = (op.lhs.dtype.name, op.rhs.dtype.name, op.out.dtype.name)
    return Gemm(op.batch, op.m, op.n, op.k, *types, op.precision, op.context, form(op))


def form(op: HeavyOp) -> Form:
    """What a shared kernel must agree on beyond M, N and K.

    Dots, and convolutions through their patches, are products and agree on nothing else. Feature groups are problems
    of their own: side by side in one grouped convolution if they read equal images through equal windows, and never
    padded. What no kernel pads otherwise is equal to itself alone.
    """
    if op.empty or op.params.get("batch_group_count", 1) > 1:
        return ("exact", op.key)
    if op.kind == "dot" or op.params["feature_group_count"] == 1:
        return PRODUCT
    how = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    return ("grouped", op.lhs.shape[:-1], op.rhs.shape[:-1], op.n, *(op.params[name] for name in how))


@dataclass(frozen=True)
class Cluster:
    """Ops that fit into one padded shape."""

    index: int
    gemm: Gemm  # padded; its batch counts the problems of all members
    members: tuple[Hashable, ...]  # by the names that the caller gave, in the caller's order
    shapes: tuple[tuple[Shape, int], ...]  # the members' own shapes, smallest first, and how many have each
    waste: float  # share of the members' FLOPs that is padding, if each runs at the cluster's shape

    @property
    def shape(self) -> Shape:
        return self.gemm.shape

    def __str__(self) -> str:
        m, n, k = self.shape
        counts = f"ops={len(self.members)} shapes={len(self.shapes)} padding={self.waste:.1%}"
        return f"cluster {self.index} M={m} N={n} K={k} {counts} {kind_text(self.gemm)}"


def waste(shape: Shape, padded: Shape) -> float:
    """Share of the work at the padded shape that is padding."""
    return 1 - prod(shape) / prod(padded) if prod(padded) else 0.0


def cluster(ops: Sequence[tuple[Hashable, HeavyOp]], *, waste_bound: float = WASTE_BOUND) -> tuple[Cluster, ...]:
    """Clusters of named ops, in an order that does not depend on that of the ops.

    Raises:
      PlanError: the bound is not in [0, 1).
    """
    if not 0 <= waste_bound < 1:
        raise PlanError(f"waste_bound is {waste_bound}; it is a share of the work and lies in [0, 1)")
    kinds: dict[Hashable, list[tuple[Hashable, Gemm]]] = {}
    for name, op in ops:
        gemm = canonical_gemm(op)
        kinds.setdefault(gemm.kind, []).append((name, gemm))
    found: list[tuple[Gemm, list[tuple[Hashable, Gemm]]]] = []
    for named in kinds.values():
        for shapes in link({gemm.shape for _, gemm in named}, waste_bound):
            inside = [(name, gemm) for name, gemm in named if gemm.shape in shapes]
            found.append((padded([gemm for _, gemm in inside]), inside))
    found.sort(key=lambda entry: (value(entry[0].kind), entry[0].shape))
    return tuple(make(i, gemm, inside) for i, (gemm, inside) in enumerate(found))


def link(shapes: Iterable[Shape], bound: float) -> list[frozenset[Shape]]:
    """Complete linkage: merge the two groups whose union wastes least in its worst shape, while that is in bound."""
    groups = dict(enumerate(frozenset({shape}) for shape in sorted(shapes)))
    numbers = count(len(groups))
    # The least volume and the common shape of a group say all about it.
    extent = {i: (prod(shape), shape) for i, (shape,) in groups.items()}

    def joined(i: int, j: int) -> tuple[float, int, int]:
        (v, a), (w, b) = extent[i], extent[j]
        volume = max(a[0], b[0]) * max(a[1], b[1]) * max(a[2], b[2])
        return (1 - min(v, w) / volume if volume else 0.0), i, j

    pairs = [pair for i, j in combinations(groups, 2) if (pair := joined(i, j))[0] <= bound]
    heapify(pairs)
    while pairs:
        _, i, j = heappop(pairs)
        if i not in groups or j not in groups:
            continue
        new, both = next(numbers), groups.pop(i) | groups.pop(j)
        extent[new] = (min(map(prod, both)), common(both))
        for pair in (joined(other, new) for other in groups):
            if pair[0] <= bound:
                heappush(pairs, pair)
        groups[new] = both
    return list(groups.values())


def neighbourhoods(ops: Sequence[Sequence[Gemm]], bound: float) -> list[int]:
    """A number for each op, which may be seen as any of several gemms: who can share a kernel at all.

    Any two that fit into one padded shape within the bound have one number, and so have those that such pairs link.
    Clusters cut a neighbourhood where it is thinnest.
    """
    found = list(dict.fromkeys(gemm for op in ops for gemm in op))
    parent = {gemm: gemm for gemm in found}

    def root(gemm: Gemm) -> Gemm:
        while parent[gemm] != gemm:
            parent[gemm] = gemm = parent[parent[gemm]]
        return gemm

    near = [(op[0], gemm) for op in ops for gemm in op[1:]]
    for a, b in combinations(found, 2):
        whole = common([a.shape, b.shape])
        if a.kind == b.kind and max(waste(a.shape, whole), waste(b.shape, whole)) <= bound:
            near.append((a, b))
    for a, b in near:
        parent[root(b)] = root(a)
    numbers = {gemm: i for i, gemm in enumerate(found)}
    return [numbers[root(op[0])] for op in ops]


def common(shapes: Iterable[Shape]) -> Shape:
    m, n, k = map(max, zip(*shapes, strict=True))
    return m, n, k


def padded(gemms: Sequence[Gemm]) -> Gemm:
    """All problems of gemms of one kind, in one shape."""
    return Gemm(sum(g.batch for g in gemms), *common(g.shape for g in gemms), *gemms[0].kind)


def make(index: int, gemm: Gemm, inside: Sequence[tuple[Hashable, Gemm]]) -> Cluster:
    shapes = Counter(g.shape for _, g in inside)
    useful, done = sum(g.batch * prod(g.shape) for _, g in inside), gemm.batch * prod(gemm.shape)
    share = 1 - useful / done if done else 0.0
    return Cluster(index, gemm, tuple(name for name, _ in inside), tuple(sorted(shapes.items())), share)


# ---- texts -----------------------------------------------------------------------------------------------------------

COLUMNS = ("cluster", "M", "N", "K", "ops", "shapes", "padding", "of")


def cells(found: Cluster) -> tuple[str, ...]:
    counts = (str(len(found.members)), str(len(found.shapes)), f"{found.waste:.1%}")
    return str(found.index), *map(str, found.shape), *counts, kind_text(found.gemm)


def kind_text(gemm: Gemm) -> str:
    """`product float32 x float32 -> float32 (HIGHEST,HIGHEST)`"""
    match gemm.form:
        case ("grouped", image, (*window, _), *_):
            name = f"grouped {times(window)} on {times(image)}"
        case (name, *_):
            pass
    precision = f" {value(gemm.precision)}" if gemm.precision is not None else ""
    return f"{name} {gemm.lhs} x {gemm.rhs} -> {gemm.out}{precision}"


def times(sizes: Any) -> str:
    return "x".join(map(str, sizes))


def clusters_text(clusters: Sequence[Cluster]) -> str:
    """A line for each cluster, under names of the columns."""
    lines = [COLUMNS, *map(cells, clusters)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    aligned = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"{' '.join(line[:-1])}  {own[-1]}" for line, own in zip(aligned, lines, strict=True))
