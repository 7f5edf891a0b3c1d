"""Run elementwise work in the superkernel whose result it reads, so that it costs no kernel and no memory traffic.

Before                                            After
    pack 0 x2 dot M=2 N=8 K=4 ...: indexed_gemm       pack 0 x2 dot M=2 N=8 K=4 ...: indexed_gemm
      f0: %3:f32[2,8] = dot_general %2 %0               f0: %3:f32[2,8] = dot_general %2 %0
    f0: %4:f32[2,8] = broadcast_in_dim %1               then f0: %4:f32[2,8] = broadcast_in_dim %1
    f0: %5:f32[2,8] = add %3 %4                         then f0: %5:f32[2,8] = add %3 %4
    f0: %6:f32[2,8] = max %5 0                          then f0: %6:f32[2,8] = max %5 0

A tail is equations of the pack's family that take its result, element by element, to one value that the rest of the
program reads; their other operands are numbers, values of the result's shape that are there when the pack runs (a
residual), and vectors over its columns (a bias); broadcasts of these move along. It does not end with a cast that
widens: half as much is written if whoever reads the value casts it.

Some kernels take the columns apart, and leave several values, so that a recurrent cell or a gated unit is one kernel:

    pack 1 x8 dot M=1 N=2048 K=512 ...: indexed_matvec     pack 1 x8 dot M=1 N=2048 K=512 ...: indexed_matvec
      f0: %17:bf16[1,2048] = dot_general %15 %12             f0: %17:bf16[1,2048] = dot_general %15 %12
    f0: %19, %20, %21, %22 = split %17                       then f0: %19, %20, %21, %22 = split %17
    ...                                                      ...
    f0: %38:bf16[1,512] = mul %37 %30                        then f0: %38:bf16[1,512] = mul %37 %30
    -> %37, %38                                              then it leaves %37, %38

XLA runs what has one row, and does to its result what keeps its shape, in one kernel too, but not this: there
indexed_matvec takes the place of batched_matvec for lanes with weights of their own, unless that was measured or named
by a caller. (A step of 8 LSTMs of 512 units takes 4.3 us on an H200 instead of 3.8 and about 1.7 in bfloat16, 6.0
instead of 5.6 and 2.0 in float32; of 8 GRUs 3.5 instead of 3.1 and 1.2, and 4.7 instead of 4.4 and 1.4.) Of one row,
what is computed for the tail alone moves into it. Relies on: every pack has its kernel. Gives: no value inside a tail
but its results has another reader. The order of everything else stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

from coalesce import jaxpr as J
from coalesce.bundle import Bundle, Item, JointLoop, Loop, Pack, packs, problems, Schedule, Step, units
from coalesce.kernels import choose, FUSING, indexed_matvec
from coalesce.passes.choose_kernels import Choice
from coalesce.passes.scopes import left_by, makers_and_readers, Name, names, with_bodies
from coalesce.passes.tails import Shapes, Tail
from coalesce.reschedule import same
from coalesce.tuning import Tuned, UNTUNED

BY_XLA, OURS = "batched_matvec", "indexed_matvec"  # which lay a weight alike


def fuse_epilogues(bundle: Bundle, *, choice: Choice = choose, tuned: Tuned = UNTUNED) -> Bundle:
    """`choice` and `tuned` as in choose_kernels."""
    may_change = choice is choose
    if not any(pack.kernel in FUSING or (may_change and pack.kernel == BY_XLA) for pack in packs(bundle.schedule)):
        return bundle
    fuser = Fuser(bundle, may_change, tuned)
    schedule = fuser.fused(bundle.schedule, left_by(bundle))
    return bundle if schedule is bundle.schedule else replace(bundle, schedule=schedule)


class Fuser:
    def __init__(self, bundle: Bundle, may_change: bool, tuned: Tuned) -> None:
        self.bundle, self.may_change, self.tuned = bundle, may_change, tuned

    def fused(self, schedule: Schedule, left: set[Name]) -> Schedule:
        """One scope, and those inside it; `left` is what it leaves to others. The same object if nothing moved."""
        inner = tuple([with_bodies(x, self.fused) if isinstance(x, Loop | JointLoop) else x for x in schedule])
        scope = Scope(inner, left)
        for place, item in enumerate(inner):
            if isinstance(item, Pack) and (kernel := self.kernel(item)):
                shapes = Shapes(item, kernel)
                tail = scope.tail(place, item, shapes)
                if kernel == item.kernel or shapes.parts(scope.eqns(tail.places)) > 1:
                    scope.move(place, tail, self.with_kernel(item, kernel))
        changed = scope.schedule()
        return schedule if same(changed, schedule) else changed

    def kernel(self, pack: Pack) -> str:
        """The kernel that would run a pack's tail, for lanes that have results of their own; empty if there is none."""
        if pack.epilogue or pack.form or len(pack.members) != 1:
            return ""
        member = pack.members[0]
        if not member.varies and self.bundle.families[member.family].width > 1:
            return ""
        if pack.kernel in FUSING:
            return pack.kernel
        groups, per_group = self.problems(pack)
        # Of lanes that share weights each has sums of its own: of 32 a kernel took 36 s to compile, and XLA's product
        # has them as rows.
        free = self.may_change and pack.kernel == BY_XLA and per_group == 1
        free = free and self.tuned.kernel(pack.op, groups, per_group) is None
        alike = member.weight is not None and indexed_matvec.supports(pack.op) and pack.op.batch == 1
        return OURS if free and alike else ""

    def with_kernel(self, pack: Pack, kernel: str) -> Pack:
        if kernel == pack.kernel:
            return pack
        return replace(pack, kernel=kernel, blocks=self.tuned.blocks(pack.op, *self.problems(pack), kernel))

    def problems(self, pack: Pack) -> tuple[int, int]:
        return problems(pack, self.bundle.families)


class Scope:
    """The items of one scope, where each value is made, and who reads it."""

    def __init__(self, items: Sequence[Item], left: set[Name]) -> None:
        self.items, self.left = items, left
        self.made, self.readers = makers_and_readers(items)  # arguments of the scope are made before everything
        self.moved: set[int] = set()
        self.packs: dict[int, Pack] = {}  # with their tails
        self.begin: list[int] = []  # where each item runs: with the first of its launch
        for unit in units(items):
            self.begin += [len(self.begin)] * len(unit)

    def steps(self, places: Iterable[int]) -> list[Step]:
        return [item for at in places if isinstance(item := self.items[at], Step)]

    def eqns(self, places: Iterable[int]) -> list[J.Eqn]:
        return [step.eqn for step in self.steps(places)]

    def tail(self, place: int, pack: Pack, shapes: Shapes) -> Tail:
        """The longest tail that a pack can take."""
        (member,) = pack.members
        f, start = member.family, member.eqn.outvars[0]
        inside = {(f, start)}
        chosen: list[int] = []
        best = Tail()
        waiting = list(self.readers.get((f, start), ()))  # who reads what is inside, the next one first
        heapify(waiting)
        seen = set(self.moved)
        while waiting:
            at = heappop(waiting)
            if at in seen or at in chosen:
                continue
            seen.add(at)
            found = self.joining(at, shapes, inside, self.begin[place]) if self.steps([at]) else None
            new = [b for b in dict.fromkeys(found or ()) if b not in chosen]
            if found is None or not shapes.few_parts(self.eqns([*chosen, *new])):
                if shapes.apart:
                    continue
                break
            chosen += new
            made = {(f, v) for eqn in self.eqns(new) for v in eqn.outvars}
            inside |= made
            for reader in {reader for name in made for reader in self.readers.get(name, ()) if reader > at}:
                heappush(waiting, reader)
            best = self.closed(chosen, f, start, shapes) or best
        return self.with_feeders(place, best, f, start, shapes) if shapes.one_row and best.places else best

    def joining(self, at: int, shapes: Shapes, inside: set[Name], begin: int) -> list[int] | None:
        """The places that have to be in a tail for a step to be, its own the last; None if it cannot be."""
        (step,) = self.steps([at])
        if not shapes.runs(step):
            return None
        found: list[int] = []
        for atom in names(step.eqn):
            name = (step.family, atom)
            needed = [] if name in inside else self.brought(name, shapes, begin)
            if needed is None:
                return None
            found += needed
        return [*found, at]

    def brought(self, name: Name, shapes: Shapes, begin: int) -> list[int] | None:
        """What has to move along for a tail to read a value; None if the tail cannot."""
        at = self.made.get(name, -1)
        steps = self.steps([at]) if at >= 0 else []
        if steps and shapes.is_column(steps[0]):
            atoms = names(steps[0].eqn)
            return [at] if all(self.made.get((name[0], a), -1) < begin for a in atoms) else None
        if at < begin:
            return [] if shapes.fits(J.shape(name[1])) else None
        return self.joining(at, shapes, set(), begin) if steps and shapes.apart and at not in self.moved else None

    def closed(self, chosen: Sequence[int], f: int, start: J.Var, shapes: Shapes) -> Tail | None:
        """The tail of some steps, if it may leave what others read of it."""
        eqns = self.eqns(chosen)
        made = {v: eqn for eqn in eqns for v in eqn.outvars}
        tail = set(chosen)  # without the product, which may read what is to move behind it
        results = tuple(
            v for v in (start, *made) if (f, v) in self.left or not tail.issuperset(self.readers.get((f, v), ()))
        )
        return Tail(tuple(chosen), results) if shapes.may_leave(results, made) else None

    def with_feeders(self, place: int, tail: Tail, f: int, start: J.Var, shapes: Shapes) -> Tail:
        """The tail with the steps before the pack that compute what it alone reads."""
        while True:
            read = dict.fromkeys(a for eqn in self.eqns(tail.places) for a in names(eqn))
            feeders = {self.made.get((f, a), -1) for a in read} - {*tail.places, place, -1}
            longer = (self.with_feeder(at, place, tail, f, start, shapes) for at in sorted(feeders))
            found = next(filter(None, longer), None)
            if found is None:
                return tail
            tail = found

    def with_feeder(self, at: int, place: int, tail: Tail, f: int, start: J.Var, shapes: Shapes) -> Tail | None:
        if at in self.moved or not self.steps([at]):
            return None
        needed = self.joining(at, shapes, set(), place)
        if needed is None or self.moved.intersection(needed):
            return None
        places = dict.fromkeys([*needed, *tail.places])
        found = self.closed(list(places), f, start, shapes) if shapes.few_parts(self.eqns(places)) else None
        return found if found and found.results == tail.results else None

    def move(self, place: int, tail: Tail, pack: Pack) -> None:
        if not tail.places:
            return
        steps = self.steps(tail.places)
        self.moved |= set(tail.places)
        self.packs[place] = replace(pack, epilogue=tuple(steps), results=tail.results)
        self.made.update(((s.family, v), place) for s in steps for v in s.eqn.outvars)

    def schedule(self) -> Schedule:
        return tuple(self.packs.get(at, item) for at, item in enumerate(self.items) if at not in self.moved)
