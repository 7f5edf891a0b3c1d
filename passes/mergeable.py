"""Which products `merge_products` may merge: the one rule, for whole programs and for the bodies of loops."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.behaviour import may_move, may_speculate
from coalesce.passes.movable import movable
from coalesce.passes.when_wanted import when_wanted
from coalesce.program import Program
from coalesce.structure import canonical, eqn_key, literal_key, value_key, ValueNumbers

ROWS = 2  # free dimensions of a left operand: more are an image's
NEAR = 1  # heavy ops between the first that wants one of the products and the first that wants another

Path = tuple[int, ...]  # of a scope: equation and region, from the top


class Weight(NamedTuple):
    """A value that depends on weights alone: what it is, and who holds the weights. Of no weights, if nobody does."""

    number: int
    holders: frozenset[Hashable]


class Member(NamedTuple):
    place: int  # of its equation in its scope
    weight: Weight


@dataclass(frozen=True)
class Group:
    """Products to merge, in the order in which their columns lie."""

    members: tuple[Member, ...]
    sums: tuple[Member, ...] = ()  # where weights are added to each of the products, if to all of them

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(member.weight.number for member in self.members)


def mergeable(program: Program) -> dict[Path, list[Group]]:
    """The groups of each scope that has some."""
    search = Search()
    top = zip(program.weights, program.leaves, strict=True)
    weights = {
        v: Weight(search.numbers.number(("arg", i)), frozenset({(leaf.shared, leaf.constant, leaf.holders)}))
        for i, (v, leaf) in enumerate(top)
    }
    search.scope(program.jaxpr, weights, ())
    return {path: found for path, found in search.worth_it().items() if found}


@dataclass
class Search:
    """Groups of every scope, and who else reads their weights: `others` by number."""

    numbers: ValueNumbers = field(default_factory=ValueNumbers)
    groups: dict[Path, list[Group]] = field(default_factory=dict)
    others: set[int] = field(default_factory=set)

    def scope(self, jaxpr: ClosedJaxpr, weights: dict[Any, Weight], path: Path) -> None:
        """Look through a scope, some of whose arguments are weights, and through its regions."""
        known = dict(weights)
        moved = movable(jaxpr, list(weights), speculative=bool(path)).eqns
        products: list[Member] = []
        for place, eqn in enumerate(jaxpr.jaxpr.eqns):
            values = self.ahead(eqn, known, speculative=bool(path))
            if values is not None:
                known.update(zip(eqn.outvars, values, strict=True))
                if id(eqn) not in moved:  # cheaper to compute than to keep: it reads its weights in every request
                    self.read(variables(eqn.invars), known)
                continue
            read = self.regions(eqn, known, (*path, place)) if J.regions(eqn) else variables(eqn.invars)
            if is_product(eqn, known):
                products.append(Member(place, known[eqn.invars[1]]))
                read.discard(eqn.invars[1])
            self.read(read, known)
        self.read(variables(J.outvars(jaxpr)), known)
        groups = groups_of(jaxpr, products)
        self.groups[path] = [replace(group, sums=sums_of(jaxpr, group, known)) for group in groups]
        grouped = {member for group in self.groups[path] for member in group.members}
        self.others.update(member.weight.number for member in products if member not in grouped)

    def read(self, values: set[Any], known: dict[Any, Weight]) -> None:
        self.others.update(known[v].number for v in values if v in known)

    def regions(self, eqn: J.Eqn, known: dict[Any, Weight], path: Path) -> set[Any]:
        """Look through the regions of an equation; returns the operands that it reads as values."""
        read = variables(eqn.invars[:1]) if eqn.primitive.name == "cond" else set()
        parts = zip(J.regions(eqn), J.region_operands(eqn), strict=True)
        for r, (region, (given, fixed)) in enumerate(parts):
            pairs = zip(J.invars(region)[:fixed], given[:fixed], strict=True)
            inner = {arg: known[a] for arg, a in pairs if not isinstance(a, J.Literal) and a in known}
            read |= variables(given[fixed:])
            self.scope(region, inner, (*path, r))
        return read

    def ahead(self, eqn: J.Eqn, known: dict[Any, Weight], speculative: bool) -> list[Weight] | None:
        """Its results, if `hoist_weights` could compute them."""
        operands = [a for a in eqn.invars if not isinstance(a, J.Literal)]
        if any(a not in known for a in operands) or not may_move(eqn) or (speculative and not may_speculate(eqn)):
            return None
        inputs = tuple(
            self.numbers.number(literal_key(a)) if isinstance(a, J.Literal) else known[a].number for a in eqn.invars
        )
        held = frozenset[Hashable]().union(*(known[a].holders for a in operands))
        key = eqn_key(eqn)
        return [Weight(self.numbers.number((key, inputs, k)), held) for k in range(len(eqn.outvars))]

    def worth_it(self) -> dict[Path, list[Group]]:
        """The groups without products whose weights anything else reads, a group of other products included."""
        found, others = self.groups, set(self.others)
        while True:
            readers: dict[int, set[tuple[int, ...]]] = defaultdict(set)
            for group in (group for own in found.values() for group in own):
                for number in group.numbers:
                    readers[number].add(group.numbers)
            wrong = others | {number for number, who in readers.items() if len(who) > 1}
            if wrong.isdisjoint(readers):
                return found
            others |= wrong
            found = {path: [kept for group in own if (kept := without(group, wrong))] for path, own in found.items()}
            left = {n for own in found.values() for group in own for n in group.numbers}
            others |= readers.keys() - left


def variables(atoms: Sequence[J.Atom]) -> set[Any]:
    return {a for a in atoms if not isinstance(a, J.Literal)}


def without(group: Group, wrong: set[int]) -> Group | None:
    kept = [i for i, number in enumerate(group.numbers) if number not in wrong]
    members, sums = (tuple(own[i] for i in kept) if own else () for own in (group.members, group.sums))
    return Group(members, sums) if len(kept) > 1 else None


def is_product(eqn: J.Eqn, known: dict[Any, Weight]) -> bool:
    """Whether it is a product of few rows, by a weight whose columns have a dimension of their own."""
    if eqn.primitive.name != "dot_general" or any(isinstance(a, J.Literal) for a in eqn.invars):
        return False
    lhs, rhs = eqn.invars
    if lhs in known or rhs not in known or not known[rhs].holders or 0 in J.shape(rhs):
        return False
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    return len(J.shape(lhs)) - len(lc) - len(lb) <= ROWS and len(J.shape(rhs)) > len(rc) + len(rb)


def columns(eqn: J.Eqn) -> tuple[int, int]:
    """The first dimension of the right operand that is free, and where it is in the result."""
    lhs, rhs = eqn.invars
    (lc, rc), (_, rb) = eqn.params["dimension_numbers"]
    return min(set(range(len(J.shape(rhs)))) - {*rc, *rb}), len(J.shape(lhs)) - len(lc)


def sums_of(jaxpr: ClosedJaxpr, group: Group, known: dict[Any, Weight]) -> tuple[Member, ...]:
    """Of each product the equation that alone reads it, if all are sums with weights that lie as its columns do."""
    eqns = jaxpr.jaxpr.eqns
    products = [eqns[member.place] for member in group.members]
    readers: dict[Any, list[int]] = {product.outvars[0]: [] for product in products}
    for place, eqn in enumerate(eqns):
        for a in variables(eqn.invars) & readers.keys():
            readers[a].append(place)
    left = variables(J.outvars(jaxpr))
    found: list[Member] = []
    shapes: set[Hashable] = set()
    for product in products:
        (result,), (_, at) = product.outvars, columns(product)
        places = readers[result] if result not in left else []
        added = [a for place in places for a in added_to(result, eqns[place])]
        if len(places) != 1 or not added or added[0] not in known:
            return ()
        shape, weight = J.shape(added[0]), known[added[0]]
        if not weight.holders or len(shape) <= at or shape[at] != J.shape(result)[at]:
            return ()
        shapes.add((len(J.shape(result)), *shape[:at], *shape[at + 1 :], weight.holders))
        found.append(Member(places[0], weight))
    # one weight for several would be larger side by side than it is, and so be laid there in every request
    apart = len({member.weight.number for member in found}) == len(found)
    return tuple(found) if len(shapes) == 1 and apart else ()


def added_to(value: J.Var, eqn: J.Eqn) -> list[J.Var]:
    """The other operand, if an equation adds to a value what it is as large as, and not the value itself."""
    if eqn.primitive.name != "add" or J.shape(eqn.outvars[0]) != J.shape(value):
        return []
    return [a for a in eqn.invars if not isinstance(a, J.Literal) and a is not value]


def groups_of(jaxpr: ClosedJaxpr, products: Sequence[Member]) -> Iterator[Group]:
    """Products that are alike but for their columns, in the order of the dataflow."""
    eqns = jaxpr.jaxpr.eqns
    alike: dict[Hashable, list[Member]] = defaultdict(list)
    for member in products:
        eqn = eqns[member.place]
        lhs, rhs = eqn.invars
        dim, _ = columns(eqn)
        shape = (*J.shape(rhs)[:dim], *J.shape(rhs)[dim + 1 :])
        params = tuple((k, value_key(v)) for k, v in sorted(eqn.params.items()))
        key = (lhs, params, J.context_key(eqn), shape, J.dtype(rhs), J.dtype(eqn.outvars[0]), member.weight.holders)
        alike[key].append(member)
    alike = {key: members for key, members in alike.items() if len(members) > 1}
    if not alike:
        return
    wanted = when_wanted(jaxpr)
    order = {id(eqn): i for i, eqn in enumerate(canonical(jaxpr, positional=True).eqns)}
    for members in alike.values():
        near: list[Member] = []
        used = [member for member in members if id(eqns[member.place]) in order]
        for member in sorted(used, key=lambda m: (wanted[m.place], order[id(eqns[m.place])])):
            if near and wanted[member.place] > wanted[near[0].place] + NEAR:
                yield from as_group(near)
                near = []
            near.append(member)
        yield from as_group(near)


def as_group(members: Sequence[Member]) -> Iterator[Group]:
    if len(members) > 1 and len({member.weight.number for member in members}) == len(members):
        yield Group(tuple(members))
