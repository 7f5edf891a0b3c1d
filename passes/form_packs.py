"""Schedule every family's equations and group heavy ops into packs.

Before                                        After
    family 0 x16(%0:f32[64,64] | ...)             pack 0 x16 dot M=1 N=64 K=64 ... [family 0 at 0 x16]
      %2:f32[1,64] = dot_general %1 %0              f0: %2:f32[1,64] = dot_general %1 %0
      %3:f32[1,64] = max %2 0                     f0: %3:f32[1,64] = max %2 0

A member is one equation at the width of its family, so all its lanes run in one superkernel. With `within_program`,
independent heavy ops of one family with equal keys (layers of two towers) become members of one pack:
everything else runs as early as it can, and when only heavy ops are ready, the largest set of equal ones is issued.
Scan, while and cond are walked into; what cannot be batched runs lane by lane and says why. Gives: `bundle.schedule` is
a topological order of every equation.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.bundle import Bundle, Item, Loop, Pack, Schedule, Step
from coalesce.dependence import flags_inside, mark
from coalesce.family import Family
from coalesce.heavy import heavy_eqns, heavy_op, is_heavy
from coalesce.member import fold, Member
from coalesce.passes.lane_rules import why_lane_by_lane, why_not_batched


@dataclass(frozen=True)
class Options:
    within_program: bool = False
    pack_unbounded_loops: bool = False


def form_packs(bundle: Bundle, *, within_program: bool = False, pack_unbounded_loops: bool = False) -> Bundle:
    if bundle.schedule or not any(family.jaxpr.jaxpr.eqns for family in bundle.families):
        return bundle
    options, numbers = Options(within_program, pack_unbounded_loops), count()
    schedule: list[Item] = []
    for f, family in enumerate(bundle.families):
        varies = [len(set(rows)) > 1 for rows in family.rows] + [family.width > 1] * len(family.inputs)
        weight_of = {var: w for w, var in enumerate(family.weights)}
        schedule += Scheduler(f, family, options, numbers).schedule(family.jaxpr, varies, weight_of, "")
    return replace(bundle, schedule=tuple(schedule))


class ReadyList:
    """Equations whose operands are bound, in the order in which they become so."""

    def __init__(self, jaxpr: ClosedJaxpr) -> None:
        self.readers: dict[Any, list[J.Eqn]] = {}
        self.missing: dict[int, int] = {}
        bound = set(J.invars(jaxpr))
        for eqn in jaxpr.jaxpr.eqns:
            unbound = {a for a in eqn.invars if not isinstance(a, J.Literal) and a not in bound}
            self.missing[id(eqn)] = len(unbound)
            for atom in unbound:
                self.readers.setdefault(atom, []).append(eqn)
        self.ready = deque(eqn for eqn in jaxpr.jaxpr.eqns if not self.missing[id(eqn)])

    def done(self, eqn: J.Eqn) -> None:
        """`eqn` ran: its results are bound."""
        for var in eqn.outvars:
            for reader in self.readers.get(var, ()):
                self.missing[id(reader)] -= 1
                if not self.missing[id(reader)]:
                    self.ready.append(reader)


class Scheduler:
    """Schedules one family, region by region."""

    def __init__(self, index: int, family: Family, options: Options, numbers: Any) -> None:
        self.index, self.family, self.options, self.numbers = index, family, options, numbers
        self.equal_ops = Counter(heavy_op(eqn).key for eqn in heavy_eqns(family.jaxpr))

    def schedule(self, jaxpr: ClosedJaxpr, varies: Sequence[bool], weight_of: dict[Any, int], prefix: str) -> Schedule:
        marks, _ = mark(jaxpr, varies)
        sites = {id(eqn): f"{prefix}{i}" for i, eqn in enumerate(jaxpr.jaxpr.eqns)}
        out: list[Item] = []
        for eqn in jaxpr.jaxpr.eqns if not self.options.within_program else ():
            if is_heavy(eqn):
                out.append(self.pack([self.member(eqn, marks, weight_of, sites[id(eqn)])]))
            else:
                out.append(self.item(eqn, marks, weight_of, sites[id(eqn)]))
        if not self.options.within_program:
            return tuple(out)
        order = ReadyList(jaxpr)
        groups: dict[Any, list[Member]] = {}  # heavy ops that are ready, by what can share a kernel call
        while order.ready or groups:
            while order.ready:
                eqn = order.ready.popleft()
                if is_heavy(eqn):
                    member = self.member(eqn, marks, weight_of, sites[id(eqn)])
                    groups.setdefault(self.company(member), []).append(member)
                else:
                    out.append(self.item(eqn, marks, weight_of, sites[id(eqn)]))
                    order.done(eqn)
            if groups:
                members = groups.pop(max(groups, key=lambda key: len(groups[key])))  # the first of those as large
                out.append(self.pack(members))
                for member in members:
                    order.done(member.eqn)
        return tuple(out)

    def company(self, member: Member) -> Any:
        """Members with equal keys fit into one kernel call."""
        how = fold(member, self.family)
        return (member.op.key, member.weight is None, member.lhs_varies, how.per_group)

    def pack(self, members: Sequence[Member]) -> Pack:
        width = sum(m.width for m in members)
        reason = "" if width > 1 else self.why_alone(members[0])
        return Pack(next(self.numbers), tuple(members), members[0].op, reason=reason)

    def why_alone(self, member: Member) -> str:
        equal = self.equal_ops[member.op.key] - 1
        if equal and not self.options.within_program:
            ops = f"{equal} equal op{'s' * (equal > 1)}"
            return f"one lane in its family; {ops} in its own program: see within_program=True"
        return "one lane in its family, and no independent equal op in its program"

    def member(self, eqn: J.Eqn, marks: dict[Any, bool], weight_of: dict[Any, int], site: str) -> Member:
        flags = [not isinstance(a, J.Literal) and marks[a] for a in eqn.invars]
        weight = None if isinstance(eqn.invars[1], J.Literal) else weight_of.get(eqn.invars[1])
        return Member(self.index, site, eqn, heavy_op(eqn), self.family.width, flags[0], flags[1], weight)

    def item(self, eqn: J.Eqn, marks: dict[Any, bool], weight_of: dict[Any, int], site: str) -> Item:
        flags = [not isinstance(a, J.Literal) and marks[a] for a in eqn.invars]
        name = eqn.primitive.name
        inside = flags_inside(eqn, flags) if name in J.REGIONS else None
        decides = inside is not None and inside.decides
        differs = self.family.width > 1 and (any(flags) or bool(eqn.effects))
        each = why_lane_by_lane(eqn, flags, decides, self.options.pack_unbounded_loops) if differs else ""
        if inside is None or each:
            held = [e for sub in J.subjaxprs(eqn) for e in heavy_eqns(sub)]
            width = self.family.width
            alone = tuple(
                Member(self.index, f"{site}.{i}", e, heavy_op(e), width, True, True, None) for i, e in enumerate(held)
            )
            weights = tuple(None if isinstance(a, J.Literal) else weight_of.get(a) for a in eqn.invars)
            batched = [not isinstance(a, J.Literal) for a in eqn.invars]
            stacks = (any(flags) or width == 1) and not (each or why_not_batched(eqn, batched))
            return Step(self.index, site, eqn, each, alone, weights, stacks)
        bodies = []
        operands = J.region_operands(eqn)
        parts = zip(J.region_labels(eqn), J.regions(eqn), inside.regions, operands, strict=True)
        for label, region, args, (atoms, fixed) in parts:
            pairs = zip(J.invars(region)[:fixed], atoms[:fixed], strict=True)
            inner = {arg: weight_of[a] for arg, a in pairs if not isinstance(a, J.Literal) and a in weight_of}
            bodies.append(self.schedule(region, args, inner, f"{site}.{label}."))
        return Loop(self.index, site, eqn, tuple(bodies), tuple(inside.varies), decides)
