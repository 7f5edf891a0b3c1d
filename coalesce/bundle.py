"""A bundle: the schedule of packs that runs many tenants' programs as one.

    Step      an equation that all lanes of its family run together, or lane by lane
    Loop      a scan, while or cond, with the schedule of each of its regions
    Pack      heavy ops that one superkernel runs; members may come from any family
    Array     one stacked array of weights: row r is one tenant's prepared weight, in the layout its readers want
    Bundle    families, schedule and arrays: everything that lowering needs, and nothing about values

A schedule is a topological order: whatever an item reads is bound by an item before it, or is an argument. Each
variable belongs to one family, so (family, variable) names a value in every scope.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coalesce import jaxpr as J
from coalesce.errors import IRError
from coalesce.family import Family
from coalesce.heavy import HeavyOp
from coalesce.layout import AS_IS, Layout


@dataclass(frozen=True, eq=False)
class Member:
    """A heavy op of a family, for all of the family's lanes."""

    family: int
    site: str  # "12", or "7.body.3" for an equation of a loop's body: position in the family's program
    eqn: J.Eqn
    op: HeavyOp
    width: int  # lanes
    lhs_varies: bool  # whether the left operand differs between lanes
    rhs_varies: bool
    weight: int | None  # which weight of the family the right operand is, if it is one


@dataclass(frozen=True)
class Fold:
    """How the lanes of a member are laid out for a kernel: `groups` distinct right operands, `per_group` lanes on each.

    `order[g][r]` is the lane in place (g, r); groups smaller than the largest repeat a lane of their own, and
    `place[lane]` is where a lane's result is found in the flattened (g, r).
    """

    groups: int
    per_group: int
    order: tuple[tuple[int, ...], ...]
    place: tuple[int, ...]

    @property
    def padding(self) -> int:
        """Places that hold a repeated lane."""
        return self.groups * self.per_group - len(set(self.place))


def fold(member: Member, family: Family) -> Fold:
    """Lanes with one right operand become rows of one matrix product."""
    lanes = range(member.width)
    rows = (
        family.rows[member.weight]
        if member.weight is not None
        else tuple(lanes)
        if member.rhs_varies
        else (0,) * len(lanes)
    )
    if not member.lhs_varies:  # one left operand: compute each distinct result once
        groups = max(rows) + 1
        return Fold(groups, 1, tuple((rows.index(g),) for g in range(groups)), rows)
    groups = [[lane for lane in lanes if rows[lane] == g] for g in range(max(rows) + 1)]
    per = max(map(len, groups))
    place = {lane: g * per + r for g, group in enumerate(groups) for r, lane in enumerate(group)}
    order = tuple(tuple((group + [group[0]] * per)[:per]) for group in groups)
    return Fold(len(groups), per, order, tuple(place[lane] for lane in lanes))


@dataclass(frozen=True, eq=False)
class Pack:
    """One superkernel, or one heavy op alone (`width` 1)."""

    index: int
    members: tuple[Member, ...]
    kernel: str = ""  # chosen by choose_kernels
    reason: str = ""  # of width 1: why nothing else is in it
    array: int | None = None  # the array its right operands lie in, set by plan_layouts

    @property
    def width(self) -> int:
        return sum(m.width for m in self.members)

    @property
    def name(self) -> str:
        return f"{'superkernel' if self.width > 1 else 'alone'}{self.index}_{self.kernel}"


@dataclass(frozen=True, eq=False)
class Step:
    """An equation of a family. `each` says why it runs lane by lane; empty: all lanes at once."""

    family: int
    site: str
    eqn: J.Eqn
    each: str = ""
    alone: tuple[Member, ...] = ()  # heavy ops inside an equation that is not walked into

    @property
    def why_alone(self) -> str:
        return self.each or f"inside {self.eqn.primitive.name}, which runs as it is"


@dataclass(frozen=True, eq=False)
class Loop:
    """Control flow of a family, walked into. `varies` flags the carry (scan, while) or the results (cond) that differ
    between lanes, `decides` whether the predicate or index does."""

    family: int
    site: str
    eqn: J.Eqn
    bodies: tuple[Schedule, ...]
    varies: tuple[bool, ...]
    decides: bool = False


Item = Step | Loop | Pack
Schedule = tuple[Item, ...]


@dataclass(frozen=True)
class Array:
    """`rows[r]` = (tenant, prepared weight): what lies in row r, in `layout`."""

    rows: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]  # of one row, in layout
    dtype: str
    layout: Layout = AS_IS


@dataclass(frozen=True, eq=False)
class Bundle:
    """The plan of one fused program."""

    tenants: tuple[str, ...]
    families: tuple[Family, ...]
    schedule: Schedule = ()
    arrays: tuple[Array, ...] = ()
    stored: Mapping[tuple[int, int], int] = field(
        default_factory=dict
    )  # (family, weight) -> the array other readers read


def items(schedule: Schedule) -> Iterator[Item]:
    """Every item, those of loop bodies after their loop."""
    for item in schedule:
        yield item
        if isinstance(item, Loop):
            for body in item.bodies:
                yield from items(body)


def packs(schedule: Schedule) -> Iterator[Pack]:
    return (item for item in items(schedule) if isinstance(item, Pack))


def equations(item: Item) -> list[tuple[int, J.Eqn]]:
    """(family, equation) of everything that an item runs at its own level."""
    if isinstance(item, Pack):
        return [(m.family, m.eqn) for m in item.members]
    return [(item.family, item.eqn)]


def map_packs(schedule: Schedule, new: Mapping[int, Pack]) -> Schedule:
    """The schedule with packs replaced by index."""

    def one(item: Item) -> Item:
        if isinstance(item, Pack):
            return new[item.index]
        if isinstance(item, Loop):
            return replace(item, bodies=tuple(map_packs(body, new) for body in item.bodies))
        return item

    return tuple(map(one, schedule))


def check_bundle(bundle: Bundle) -> None:
    """Raise IRError unless every family's equations are scheduled exactly once, after what they read."""
    scopes = [(f, J.invars(fam.jaxpr), fam.jaxpr) for f, fam in enumerate(bundle.families)]
    check_schedule(bundle.schedule, scopes)
    numbers = sorted(pack.index for pack in packs(bundle.schedule))
    if numbers != list(range(len(numbers))):
        raise IRError(f"packs are numbered {numbers}")


def check_schedule(schedule: Schedule, scopes: Sequence[tuple[int, list[J.Var], object]]) -> None:
    bound = {(f, v) for f, args, _ in scopes for v in args}
    want = {(f, id(eqn)): eqn for f, _, jaxpr in scopes for eqn in jaxpr.jaxpr.eqns}  # type: ignore[attr-defined]
    for item in schedule:
        ran = equations(item)
        for f, eqn in ran:
            if want.pop((f, id(eqn)), None) is None:
                raise IRError(f"family {f}: {eqn.primitive.name} is scheduled twice or is not of this scope")
            for atom in eqn.invars:
                if not isinstance(atom, J.Literal) and (f, atom) not in bound:
                    raise IRError(f"family {f}: {eqn.primitive.name} runs before what it reads")
        bound |= {(f, v) for f, eqn in ran for v in eqn.outvars}  # members of a pack see nothing of each other
        if isinstance(item, Loop):
            if len(item.bodies) != len(J.regions(item.eqn)):
                raise IRError(
                    f"family {item.family}: {item.eqn.primitive.name} has {len(item.bodies)} scheduled regions"
                )
            for body, region in zip(item.bodies, J.regions(item.eqn), strict=True):
                check_schedule(body, [(item.family, J.invars(region), region)])
    if want:
        names = sorted(eqn.primitive.name for eqn in want.values())
        raise IRError(f"never scheduled: {', '.join(names)}")
