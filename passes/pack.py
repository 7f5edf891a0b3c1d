"""Issue together what `align` chose: one schedule for all families, and as much as possible of what lies between packs.

Before                                            After
    pack 0 x1 dot M=1 N=8 K=4                         pack 0 x2 dot M=1 N=8 K=6 padded
      f0: %2:f32[1,8] = dot_general %1 %0               f0: %2:f32[1,8] = dot_general %1 %0
    f0: %3:f32[1,8] = tanh %2                           f1: %2:f32[1,7] = dot_general %1 %0
    pack 1 x1 dot M=1 N=7 K=6                         together
      f1: %2:f32[1,7] = dot_general %1 %0               f0: %3:f32[1,8] = tanh %2
    f1: %3:f32[1,7] = tanh %2                           f1: %3:f32[1,7] = tanh %2

A pack of several members leaves one padded stack (coalesce.lanes.Joint). Equations that read the parts of one stack in
the same way run on it as one, so that the next pack of the same members finds its operand stacked; carries of joint
scans stay stacked from step to step. Relies on: what is aligned makes no cycle. Gives: `bundle.schedule` is a
topological order of every equation (passes/interleave.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from coalesce import jaxpr as J
from coalesce.bundle import (
    Bundle,
    Item,
    items,
    JointLoop,
    JointStep,
    Loop,
    Pack,
    packs,
    Place,
    place_of,
    Schedule,
    Step,
)
from coalesce.errors import IRError
from coalesce.member import fold
from coalesce.passes.interleave import Interleave, Unit
from coalesce.passes.stacks import Name, Stacks
from coalesce.reschedule import map_schedule
from coalesce.unify import unify


def pack(bundle: Bundle) -> Bundle:
    places = {place_of(item) for item in items(bundle.schedule) if not isinstance(item, JointStep | Step)}
    pending = any(len(places & set(group.places)) > 1 for group in bundle.aligned)
    if not pending and not any(map(can_stack, packs(bundle.schedule))):
        return bundle
    schedule = Packer(bundle).schedule(bundle.schedule, Stacks())
    numbers = count()  # in the order of the schedule
    return replace(
        bundle,
        schedule=map_schedule(
            schedule, lambda item: replace(item, index=next(numbers)) if isinstance(item, Pack) else item
        ),
    )


def can_stack(item: Pack) -> bool:
    """Whether a pack of one family, of several members, can leave its results stacked."""
    return not item.form and len(item.members) > 1 and all(m.varies for m in item.members)


class Packer:
    """Makes one item of what `align` chose, scope by scope."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.group_of: dict[Place, tuple[Place, ...]] = {p: g.places for g in bundle.aligned for p in g.places}
        self.form_of = {g.places: g.form for g in bundle.aligned}

    def schedule(self, scope: Sequence[Item], stacks: Stacks) -> Schedule:
        return Interleave(scope, self.group_of, stacks, self.merged).run()

    def merged(self, unit: Unit) -> Item:
        """One item that does what all of a unit do."""
        ordered: list[Any] = sorted(unit, key=place_of)
        first = ordered[0]
        match first:
            case Loop() if len(unit) > 1:
                return self.joint_loop(ordered)
            case Loop():
                return replace(first, bodies=tuple(self.schedule(body, Stacks()) for body in first.bodies))
            case Pack() if len(unit) > 1:
                return self.shared(ordered, self.form_of[self.group_of[place_of(first)]])
            case Pack() if can_stack(first):
                return replace(first, form="equal")
        return first

    def rows(self, part: Pack) -> list[int]:
        """Lanes that share each problem of a pack's members."""
        return [fold(m, self.bundle.families[m.family]).per_group for m in part.members]

    def shared(self, parts: Sequence[Pack], form: str) -> Pack:
        """One superkernel for the packs of several families."""
        members = tuple(m for part in parts for m in part.members)
        shared = unify([m.op for m in members], [n for part in parts for n in self.rows(part)], (form,))
        if shared is None:
            names = ", ".join(f"family {m.family} at {m.site}" for m in members)
            raise IRError(f"{names}: aligned as {form!r}, which they are not")
        return Pack(parts[0].index, members, shared.op, form)

    def joint_loop(self, loops: Sequence[Loop]) -> JointLoop:
        """Scans as one. All carries that could stay stacked are taken to, until the body leaves them so."""
        scans = [J.as_scan(loop.eqn) for loop in loops]
        scope = [item for loop in loops for item in loop.bodies[0]]

        def names(row: Sequence[int], *, after: bool) -> tuple[Name, ...]:
            """A carry of each body, as it comes in or as it is left."""
            parts = zip(loops, scans, row, strict=True)
            if after:
                return tuple((loop.family, J.outvars(scan.body)[k]) for loop, scan, k in parts)
            return tuple((loop.family, J.invars(scan.body)[len(scan.consts) + k]) for loop, scan, k in parts)

        together = self.stackable(loops)
        while True:
            stacks = Stacks([names(row, after=False) for row in together])
            body = self.schedule(scope, stacks)
            kept = tuple(row for row in together if stacks.are_one(names(row, after=True)))
            if kept == together:
                return JointLoop(tuple(loops), body, together)
            together = kept

    def stackable(self, loops: Sequence[Loop]) -> tuple[tuple[int, ...], ...]:
        """Carries of equal rank and dtype, paired in order: their positions in each loop."""
        found: list[dict[Any, list[int]]] = []
        for loop in loops:
            alone = self.bundle.families[loop.family].width == 1
            kinds: dict[Any, list[int]] = {}
            for k, atom in enumerate(J.as_scan(loop.eqn).init):
                weak = getattr(atom.aval, "weak_type", False)
                if J.shape(atom) and not J.is_key(atom.aval) and not weak and (loop.varies[k] or alone):
                    kinds.setdefault((len(J.shape(atom)), J.dtype(atom)), []).append(k)
            found.append(kinds)
        shared = [kind for kind in found[0] if all(kind in kinds for kinds in found)]
        return tuple(row for kind in shared for row in zip(*(kinds[kind] for kinds in found), strict=False))
