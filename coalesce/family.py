"""Families: tenants whose normalised programs are the same computation, with different weights.

    Lane      one tenant in its family: which of its weights and inputs the family's arguments are
    Family    the one program that all lanes run, with weights and inputs numbered by first use

Two programs are of one family if their dataflow from the outputs is equal, shapes, dtypes, parameters and scalar
literals included. Lanes that share an array have one row for it: `rows[w][lane]`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.program import Leaf, Program
from coalesce.structure import Canonical, canonical, literal_key, ValueNumbers
from coalesce.text import scalar

LeafTokens = Sequence[Hashable]  # for each weight of a program, what it is


@dataclass(frozen=True)
class Lane:
    tenant: int  # position among the programs given to `fuse`
    weights: tuple[int, ...]  # for each weight of the family, which prepared weight of the tenant it is
    inputs: tuple[int, ...]  # for each input of the family, which flat input of the tenant it is


@dataclass(frozen=True, eq=False)
class Family:
    """Lanes that run `jaxpr`: (weights..., inputs...) -> the outputs of each tenant, in its own order."""

    jaxpr: ClosedJaxpr
    n_weights: int
    lanes: tuple[Lane, ...]
    rows: tuple[tuple[int, ...], ...]  # rows[w][lane]: which row of the weight's array the lane reads
    owners: tuple[tuple[tuple[int, int], ...], ...]  # owners[w][row]: the (tenant, prepared weight) that the row holds

    @property
    def width(self) -> int:
        return len(self.lanes)

    def is_own(self, weight: int) -> bool:
        """Whether each lane has a row of its own of it, in their order."""
        return self.rows[weight] == tuple(range(self.width))

    @property
    def weights(self) -> list[J.Var]:
        return J.invars(self.jaxpr)[: self.n_weights]

    @property
    def inputs(self) -> list[J.Var]:
        return J.invars(self.jaxpr)[self.n_weights :]


def find_families(programs: Sequence[Program], leaves: Sequence[LeafTokens] | None = None) -> tuple[Family, ...]:
    """Group normalised programs; families and lanes stand in the order of their first tenant.

    `leaves` are the `leaf_tokens` of the programs, if they are known already: of some leaves all bytes are read.
    """
    found: dict[Any, list[tuple[int, Canonical]]] = {}
    forms: dict[int, Canonical] = {}
    for i, program in enumerate(programs):
        form = forms.get(id(program.jaxpr))
        if form is None:
            form = forms[id(program.jaxpr)] = canonical(program.jaxpr, program.n_weights)
        found.setdefault(form.key, []).append((i, form))
    numbers = ValueNumbers()
    leaves = leaves or leaf_tokens(programs)
    tokens = [weight_tokens(p, own, numbers) for p, own in zip(programs, leaves, strict=True)]
    # Equal values have one owner in the whole bundle, so that families too keep one copy of what they share.
    owner: dict[Hashable, tuple[int, int]] = {}
    for i, row in enumerate(tokens):
        for w, token in enumerate(row):
            owner.setdefault(token, (i, w))
    return tuple(family([(i, programs[i], form) for i, form in g], tokens, owner) for g in found.values())


def family(
    group: Sequence[tuple[int, Program, Canonical]],
    tokens: Sequence[Sequence[Hashable]],
    owner: Mapping[Hashable, tuple[int, int]],
) -> Family:
    """A family from its tenants: (tenant, its program, the canonical form of it)."""
    _, first, form = group[0]
    n = first.n_weights
    args = J.invars(first.jaxpr)
    order = [a for a in form.args if a < n] + [a for a in form.args if a >= n]
    jaxpr = J.close([args[a] for a in order], form.eqns, J.outvars(first.jaxpr), "family")
    lanes = by_share_group([lane_of(i, p, f) for i, p, f in group], tokens)
    rows, owners = [], []
    for w in range(sum(a < n for a in order)):
        column = [tokens[lane.tenant][lane.weights[w]] for lane in lanes]
        rows.append(row_numbers(column))
        owners.append(tuple(owner[token] for token in dict.fromkeys(column)))
    return Family(jaxpr, len(rows), tuple(lanes), tuple(rows), tuple(owners))


def lane_of(tenant: int, program: Program, form: Canonical) -> Lane:
    n = program.n_weights
    return Lane(tenant, tuple(a for a in form.args if a < n), tuple(a - n for a in form.args if a >= n))


def row_numbers(tokens: Sequence[Hashable]) -> tuple[int, ...]:
    """Equal tokens get equal numbers, counted up in the order of appearance."""
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(t, len(numbers)) for t in tokens)


def by_share_group(lanes: Sequence[Lane], tokens: Sequence[Sequence[Hashable]]) -> list[Lane]:
    """Lanes with the same shared arrays side by side, so that a group is a contiguous run of lanes."""
    counts = Counter(token for lane in lanes for token in {tokens[lane.tenant][w] for w in lane.weights})
    groups: dict[Hashable, list[Lane]] = {}
    for lane in lanes:
        shared = tuple(t for t in (tokens[lane.tenant][w] for w in lane.weights) if counts[t] > 1)
        groups.setdefault(shared, []).append(lane)
    return [lane for group in groups.values() for lane in group]


def weight_tokens(program: Program, leaves: LeafTokens, numbers: ValueNumbers) -> LeafTokens:
    """For each prepared weight, what it is: equal tokens mean the same computation on the same raw weights."""
    return numbers.of(program.prepare, leaves) if program.prepare is not None else leaves


def leaf_tokens(programs: Sequence[Program]) -> list[LeafTokens]:
    """For each raw weight of each program, what it is: equal tokens mean the same array."""
    return [[leaf_token(program, leaf) for leaf in program.leaves] for program in programs]


def leaf_token(program: Program, leaf: Leaf) -> Hashable:
    if leaf.constant or (leaf.shared and leaf.value is not None):
        array = np.asarray(leaf.value)
        return (array.shape, array.dtype.name, hashlib.blake2b(array.tobytes(), digest_size=16).digest())
    if leaf.shared:
        return ("declared", leaf.path, leaf.aval.shape, str(leaf.aval.dtype))
    return ("array", id(leaf.value)) if leaf.value is not None else ("own", id(program), leaf.path)


def holders_of(programs: Sequence[Program], leaves: Sequence[LeafTokens]) -> dict[int, list[Hashable]]:
    """By traced function (its id), for each of its leaves: which programs hold the array that each tenant has there.

    A tenant is one whose program is the same computation, as far as that shows before any pass: what is decided by it
    is decided alike for functions of their own.
    """
    found: dict[Hashable, set[int]] = {}
    for i, own in enumerate(leaves):
        for token in own:
            found.setdefault(token, set()).add(i)
    sets = {token: frozenset(holders) for token, holders in found.items()}
    forms: dict[int, Canonical] = {}
    rows: dict[Hashable, list[list[Hashable]]] = {}
    for program, own in zip(programs, leaves, strict=True):
        form = forms.get(id(program.jaxpr))
        if form is None:
            form = forms[id(program.jaxpr)] = canonical(program.jaxpr, program.n_weights)
        rows.setdefault(form.key, []).append([sets[own[a]] for a in form.args if a < program.n_weights])
    columns = {key: list(zip(*alike, strict=True)) for key, alike in rows.items()}
    held: dict[int, list[Hashable]] = {}
    for program in programs:
        form = forms[id(program.jaxpr)]
        used = [a for a in form.args if a < program.n_weights]
        by_leaf = dict(zip(used, columns[form.key], strict=True))
        held[id(program.jaxpr)] = [by_leaf.get(a) for a in range(len(program.leaves))]  # None: nothing reads it
    return held


@dataclass(frozen=True)
class Split:
    """Two families that differ in the value of a scalar literal alone."""

    families: tuple[int, int]
    primitive: str
    literals: tuple[str, str]
    source: str

    def __str__(self) -> str:
        (i, j), (x, y) = self.families, self.literals
        at = f" at {self.source}" if self.source else ""
        return f"families {i} and {j} differ in a literal alone: {self.primitive} has {x} in {i} and {y} in {j}{at}"


def literal_splits(families: Sequence[Family]) -> list[Split]:
    """Families that one literal keeps apart: tenants that are nearly, not quite, the same."""
    blind: dict[Any, int] = {}
    splits: list[Split] = []
    for i, fam in enumerate(families):
        first = blind.setdefault(canonical(fam.jaxpr, fam.n_weights, literals=False).key, i)
        if first != i:
            splits.append(first_difference(first, i, families[first].jaxpr, fam.jaxpr))
    return splits


def first_difference(i: int, j: int, a: ClosedJaxpr, b: ClosedJaxpr) -> Split:
    for ours, theirs in zip(J.walk(a), J.walk(b), strict=False):
        for x, y in zip(ours.invars, theirs.invars, strict=False):
            if isinstance(x, J.Literal) and isinstance(y, J.Literal):
                if literal_key(x) == literal_key(y):
                    continue
                texts = scalar(J.literal_value(x)), scalar(J.literal_value(y))
                if texts[0] == texts[1]:  # they differ behind the digits that texts show
                    texts = repr(J.literal_value(x)), repr(J.literal_value(y))
                return Split((i, j), ours.primitive.name, texts, J.source(theirs))
    return Split((i, j), "output", ("?", "?"), "")
