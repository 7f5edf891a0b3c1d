"""Products of one left operand by weights become one product, and slices of its result.

Before                                                  After
    a(%0:f32[4,8], %1:f32[4,2] | %2:f32[3,4])               a(%0:f32[4,8], %1:f32[4,2] | %2:f32[3,4])
      %3:f32[3,8] = dot_general %2 %0                         %3:f32[4,10] = concatenate %0 %1 [dimension=1]
      %4:f32[3,2] = dot_general %2 %1                         %4:f32[3,10] = dot_general %2 %3
      ...                                                     %5:f32[3,8] = slice %4 [limit_indices=(3,8) ...]
                                                              %6:f32[3,2] = slice %4 [limit_indices=(3,10) ...]

The Q, K and V of attention, the gates of a recurrent cell: one product of all columns is one launch instead of three,
with three times the work. The weights are laid side by side by `hoist_weights`, once a tenant; XLA, which merges such
products too, would do it in every call.

Merged are products that differ in a free dimension of their right operands alone, and that are wanted about as soon:
the keys of all layers that attend to one memory are not computed before the first. No weight comes to lie in the bank
twice by it: everything that reads one of the weights reads it as part of the same product, and the same tenants share
it. Products of images, whose rows are positions, stay: they have rows enough, and a kernel that runs what follows each.
Nor do convolutions merge, for the same reason. What is merged depends on no size of a request and no order in which
a program was written, so that its request shapes share their weights, and its like is one family with it.

Relies on cse, which makes equal left operands one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jax import lax
from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.behaviour import may_move, may_speculate
from coalesce.heavy import HEAVY
from coalesce.passes.canonical_rules import freeze, keep
from coalesce.passes.lift_from_steps import behind
from coalesce.program import Leaf, Program
from coalesce.rewrite import Rewriter, Staged
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

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(member.weight.number for member in self.members)


def merge_products(program: Program) -> Program:
    if program.prepare is not None:  # weights lie as they will lie
        return program
    search = Search()
    top = zip(program.weights, program.leaves, strict=True)
    weights = {v: Weight(search.numbers.number(("arg", i)), holders(leaf)) for i, (v, leaf) in enumerate(top)}
    search.scope(program.jaxpr, weights, ())
    groups = {path: found for path, found in search.worth_it().items() if found}
    return program.with_jaxpr(merged(program.jaxpr, (), groups, Rewriter({}))) if groups else program


def holders(leaf: Leaf) -> frozenset[Hashable]:
    return frozenset({(leaf.shared, leaf.constant, leaf.holders)})


@dataclass
class Search:
    """Groups of every scope, and who else reads their weights: `others` by number."""

    numbers: ValueNumbers = field(default_factory=ValueNumbers)
    groups: dict[Path, list[Group]] = field(default_factory=dict)
    others: set[int] = field(default_factory=set)

    def scope(self, jaxpr: ClosedJaxpr, weights: dict[Any, Weight], path: Path) -> None:
        """Look through a scope, some of whose arguments are weights, and through its regions."""
        known = dict(weights)
        products: list[Member] = []
        for place, eqn in enumerate(jaxpr.jaxpr.eqns):
            values = self.ahead(eqn, known, speculative=bool(path))
            if values is not None:
                known.update(zip(eqn.outvars, values, strict=True))
                continue
            read = self.regions(eqn, known, (*path, place)) if J.regions(eqn) else variables(eqn.invars)
            if is_product(eqn, known):
                products.append(Member(place, known[eqn.invars[1]]))
                read.discard(eqn.invars[1])
            self.read(read, known)
        self.read(variables(J.outvars(jaxpr)), known)
        self.groups[path] = list(groups_of(jaxpr, products))
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
        """Its results, if `hoist_weights` may compute them."""
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
    members = tuple(member for member in group.members if member.weight.number not in wrong)
    return replace(group, members=members) if len(members) > 1 else None


def is_product(eqn: J.Eqn, known: dict[Any, Weight]) -> bool:
    """Whether it is a product of few rows, by a weight whose columns have a dimension of their own."""
    if eqn.primitive.name != "dot_general" or any(isinstance(a, J.Literal) for a in eqn.invars):
        return False
    lhs, rhs = eqn.invars
    if lhs in known or rhs not in known or not known[rhs].holders or 0 in (*J.shape(lhs), *J.shape(rhs)):
        return False
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    return len(J.shape(lhs)) - len(lc) - len(lb) <= ROWS and len(J.shape(rhs)) > len(rc) + len(rb)


def columns(eqn: J.Eqn) -> tuple[int, int]:
    """The first dimension of the right operand that is free, and where it is in the result."""
    lhs, rhs = eqn.invars
    (lc, rc), (_, rb) = eqn.params["dimension_numbers"]
    return min(set(range(len(J.shape(rhs)))) - {*rc, *rb}), len(J.shape(lhs)) - len(lc)


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


def when_wanted(jaxpr: ClosedJaxpr) -> list[int]:
    """For each equation, how many heavy ops in a row come before the first that reads its results, through others."""
    eqns = jaxpr.jaxpr.eqns
    heavy = [not J.primitives(eqn).isdisjoint(HEAVY) for eqn in eqns]
    depth: dict[Any, int] = {}
    done: list[int] = []
    for eqn, own in zip(eqns, heavy, strict=True):
        done.append(own + max((depth.get(a, 0) for a in eqn.invars if not isinstance(a, J.Literal)), default=0))
        depth.update(dict.fromkeys(eqn.outvars, done[-1]))
    last = max(done, default=0) + 1
    read: dict[Any, int] = {}
    wanted = [last] * len(eqns)
    for i, eqn in reversed(list(enumerate(eqns))):
        wanted[i] = min((read.get(v, last) for v in eqn.outvars), default=last)
        for a in eqn.invars:
            if not isinstance(a, J.Literal):
                read[a] = min(read.get(a, last), done[i] if heavy[i] else wanted[i])
    return wanted


def merged(jaxpr: ClosedJaxpr, path: Path, groups: dict[Path, list[Group]], rewriter: Rewriter) -> ClosedJaxpr:
    """The scope with its groups merged, each where its first product stood, and its regions with theirs."""
    eqns = jaxpr.jaxpr.eqns
    own = groups.get(path, [])
    firsts = {min(member.place for member in group.members): group for group in own}
    gone = {member.place for group in own for member in group.members}
    splicer, env = J.Splicer(), dict[Any, J.Atom]()
    emitted: set[int] = set()

    def emit(place: int) -> None:
        eqn = eqns[place]
        emitted.add(place)
        old = J.regions(eqn)
        inner = [merged(region, (*path, place, r), groups, rewriter) for r, region in enumerate(old)]
        ins = [J.read(env, a) for a in eqn.invars]
        same = all(a is b for a, b in zip([*ins, *inner], [*eqn.invars, *old], strict=True))
        splicer.eqns.append(eqn if same else J.respell(eqn, ins, eqn.outvars, inner or None))

    places = {id(eqn): place for place, eqn in enumerate(eqns)}
    for place in range(len(eqns)):
        if place in firsts:
            products = [eqns[member.place] for member in firsts[place].members]
            for needed in behind(eqns, [product.invars[1] for product in products]):
                if places[id(needed)] not in emitted:
                    emit(places[id(needed)])
            env.update(side_by_side(products, env, splicer, rewriter))
        elif place not in gone and place not in emitted:
            emit(place)
    unchanged = not own and all(a is b for a, b in zip(splicer.eqns, eqns, strict=True))
    outs = [J.read(env, a) for a in J.outvars(jaxpr)]
    return jaxpr if unchanged else J.close(J.invars(jaxpr), splicer.eqns, outs)


def side_by_side(
    products: Sequence[J.Eqn], env: dict[Any, J.Atom], splicer: J.Splicer, rewriter: Rewriter
) -> list[tuple[Any, J.Atom]]:
    """Emit the product of all, and its slices: (result of a product, what stands for it)."""
    args = [J.read(env, products[0].invars[0]), *(product.invars[1] for product in products)]
    staged = Staged(one_product, args, {"columns": columns(products[0]), **freeze(products[0].params)})
    slices = splicer.inline(rewriter.fragment(staged), args, like=products[0])
    return [(product.outvars[0], out) for product, out in zip(products, slices, strict=True)]


def one_product(lhs: Any, *weights: Any, columns: tuple[int, int], **params: Any) -> list[Any]:
    dim, place = columns
    out = lax.dot_general(lhs, lax.concatenate(weights, dim), **keep(params))
    ends = [sum(w.shape[dim] for w in weights[: i + 1]) for i in range(len(weights))]
    parts = zip([0, *ends], ends, strict=False)
    return [lax.slice_in_dim(out, start, end, axis=place) for start, end in parts]
