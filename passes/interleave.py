"""One order for the items of several families' scopes, in which what was aligned runs as one.

Everything runs as early as it can: light equations first, then the pack or loop that stands earliest in its family's
program. An equation that reads a stack waits for its partners, those that read the other parts of it in the same way,
as long as anything else can run. All of a joint step is ready when it is issued, so it makes no cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from coalesce import jaxpr as J
from coalesce.bundle import equations, Item, JointLoop, JointStep, Pack, Place, place_of, Schedule, STACKED, Step
from coalesce.errors import IRError
from coalesce.passes.stacks import alike, can_join, Name, Stacks

Unit = Sequence[Item]  # what runs as one


class Interleave:
    """Schedules one scope; `merge` makes one item of a unit."""

    def __init__(
        self,
        scope: Sequence[Item],
        group_of: dict[Place, tuple[Place, ...]],
        stacks: Stacks,
        merge: Callable[[Unit], Item],
    ) -> None:
        self.stacks, self.merge = stacks, merge
        self.out: list[Item] = []
        units: dict[Any, list[Item]] = {}
        for i, item in enumerate(scope):
            places = None if isinstance(item, Step) else group_of.get(place_of(item))
            units.setdefault(i if places is None else places, []).append(item)
        self.units = list(units.values())
        self.unit_of = {id(item): u for u, unit in enumerate(self.units) for item in unit}
        self.progress = progress(scope)
        self.link()

    def link(self) -> None:
        """What each unit waits for, and who reads what."""
        reads = [(u, it, f, e) for u, unit in enumerate(self.units) for it in unit for f, e in equations(it)]
        maker = {(f, v): u for u, _, f, e in reads for v in e.outvars}
        self.after: list[set[int]] = [set() for _ in self.units]
        self.readers: dict[Name, list[tuple[Step, int]]] = {}
        for u, item, f, e in reads:
            for k, atom in enumerate(e.invars):
                if isinstance(atom, J.Literal):
                    continue
                if (f, atom) in maker:
                    self.after[maker[f, atom]].add(u)
                if isinstance(item, Step):
                    self.readers.setdefault((f, atom), []).append((item, k))
        self.missing = [0] * len(self.units)
        for later in self.after:
            for u in later:
                self.missing[u] += 1

    def run(self) -> Schedule:
        self.done: set[int] = set()
        self.ready = [u for u, n in enumerate(self.missing) if not n]
        self.waiting: list[int] = []  # steps whose partners may come yet
        while self.ready or self.waiting:
            if not (self.run_light() or self.run_hopeless() or self.run_joint() or self.run_heavy()):
                self.issue(self.waiting.pop(0))
        if len(self.done) < len(self.units):
            rest = len(self.units) - len(self.done)
            raise IRError(f"{rest} items wait for each other: packs were aligned in a cycle")
        return tuple(self.out)

    def run_light(self) -> bool:
        """Every step that is ready, but for those that wait for partners."""
        light = [u for u in self.ready if isinstance(self.units[u][0], Step)]
        self.ready = [u for u in self.ready if not isinstance(self.units[u][0], Step)]
        for u in light:
            if self.may_find_partners(self.step(u)):
                self.waiting.append(u)
            else:
                self.issue(u)
        return bool(light)

    def run_hopeless(self) -> bool:
        """Steps whose partners have run without them."""
        hopeless = [u for u in self.waiting if not self.may_find_partners(self.step(u))]
        self.waiting = [u for u in self.waiting if u not in hopeless]
        for u in hopeless:
            self.issue(u)
        return bool(hopeless)

    def run_joint(self) -> bool:
        found = next(filter(None, map(self.joint_from, self.waiting)), None)
        if found is None:
            return False
        self.waiting = [u for u in self.waiting if u not in found]
        step = JointStep(tuple(map(self.step, found)))
        self.out.append(step)
        for column in zip(*(part.eqn.outvars for part in step.parts), strict=True):
            self.stacks.leave(tuple((part.family, v) for part, v in zip(step.parts, column, strict=True)))
        for u in found:
            self.finish(u)
        return True

    def run_heavy(self) -> bool:
        if not self.ready:
            return False
        u = min(self.ready, key=lambda u: (min(self.progress[id(item)] for item in self.units[u]), u))
        self.ready.remove(u)
        self.issue(u)
        return True

    def issue(self, u: int) -> None:
        item = self.merge(self.units[u])
        self.out.append(item)
        if isinstance(item, Pack) and item.form in STACKED:
            self.stacks.leave(tuple((m.family, m.eqn.outvars[0]) for m in item.members))
        if isinstance(item, JointLoop):
            for row in item.stacked:
                parts = zip(item.parts, row, strict=True)
                self.stacks.leave(tuple((part.family, part.eqn.outvars[k]) for part, k in parts))
        self.finish(u)

    def finish(self, u: int) -> None:
        self.done.add(u)
        for later in sorted(self.after[u]):
            self.missing[later] -= 1
            if not self.missing[later]:
                self.ready.append(later)

    def step(self, u: int) -> Step:
        (step,) = self.units[u]
        assert isinstance(step, Step), f"unit {u} is no step"
        return step

    # ---- joint steps -------------------------------------------------------------------------------------------------

    def may_find_partners(self, step: Step) -> bool:
        """Whether each other part of the stack that a step reads has a reader like it, which has not run yet."""
        found = self.stacks.read_by(step)
        if found is None or not can_join(step):
            return False
        k, at = found
        return all(
            any(
                position == k and self.unit_of[id(other)] not in self.done and alike(step, other)
                for other, position in self.readers.get(name, ())
            )
            for i, name in enumerate(at.names)
            if i != at.index
        )

    def joint_from(self, u: int) -> tuple[int, ...] | None:
        """The parts, in order, of a joint step whose first part is the waiting step `u`."""
        found = self.stacks.read_by(self.step(u))
        if found is None or found[1].index:
            return None
        k, at = found
        chosen = [u]
        for index in range(1, len(at.names)):
            for v in self.waiting:
                own = self.stacks.read_by(self.step(v))
                reads_it = own is not None and own[0] == k and own[1].names is at.names and own[1].index == index
                if reads_it and v not in chosen and self.stacks.fit([*map(self.step, chosen), self.step(v)]):
                    chosen.append(v)
                    break
            else:
                return None
        return tuple(chosen)


def progress(scope: Sequence[Item]) -> dict[int, float]:
    """How far into its family's part of the scope each item stands, 0 to 1: families progress side by side."""
    place: dict[int, tuple[int, int]] = {}
    sizes: dict[int, int] = {}
    for item in scope:
        family = equations(item)[0][0]
        sizes[family] = sizes.get(family, 0) + 1
        place[id(item)] = family, sizes[family]
    return {key: position / sizes[family] for key, (family, position) in place.items()}
