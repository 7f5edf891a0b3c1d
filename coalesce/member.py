"""A heavy op of a family, and how the family's lanes lie in a kernel."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from coalesce import jaxpr as J
from coalesce.family import Family
from coalesce.heavy import HeavyOp


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

    @property
    def varies(self) -> bool:
        """Whether each lane has a result of its own."""
        return self.lhs_varies or self.rhs_varies or self.width == 1


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
    if member.weight is not None:
        rows = family.rows[member.weight]
    else:
        rows = tuple(lanes) if member.rhs_varies else (0,) * len(lanes)
    if not member.lhs_varies:  # one left operand: compute each distinct result once
        groups = max(rows) + 1
        return Fold(groups, 1, tuple((rows.index(g),) for g in range(groups)), rows)
    return folded(rows)


def stacked_fold(members: Sequence[Member], families: Sequence[Family]) -> Fold:
    """The same for the lanes of several members, one member after another: a weight that several families share is one
    right operand."""
    rows: list[Hashable] = []
    for i, m in enumerate(members):
        if m.weight is not None:
            family = families[m.family]
            rows += [family.owners[m.weight][row] for row in family.rows[m.weight]]
        else:
            rows += [(i, lane if m.rhs_varies else 0) for lane in range(m.width)]
    number = {row: g for g, row in enumerate(dict.fromkeys(rows))}
    return folded([number[row] for row in rows])


def folded(rows: Sequence[int]) -> Fold:
    """Lanes by the right operand that each reads."""
    groups: list[list[int]] = [[] for _ in range(max(rows) + 1)]
    for lane, g in enumerate(rows):
        groups[g].append(lane)
    per = max(map(len, groups))
    place = {lane: g * per + r for g, group in enumerate(groups) for r, lane in enumerate(group)}
    order = tuple(tuple((group + group[:1] * per)[:per]) for group in groups)
    return Fold(len(groups), per, order, tuple(place[lane] for lane in range(len(rows))))
