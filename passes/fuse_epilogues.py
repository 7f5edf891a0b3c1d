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
widens: half as much is written if whoever reads the value casts it. Relies on: every pack has its kernel. Gives: no
value inside a tail but the last has another reader. The order of everything else stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod

from coalesce import jaxpr as J
from coalesce.bundle import Bundle, equations, Item, Loop, Pack, packs, Schedule, Step, units
from coalesce.kernels import FUSING
from coalesce.kernels.epilogue import runs_on_tiles
from coalesce.passes.scopes import left_by, Name, names, with_bodies
from coalesce.reschedule import same

DTYPES = ("float32", "bfloat16", "float16", "bool")


def fuse_epilogues(bundle: Bundle) -> Bundle:
    if not any(pack.kernel in FUSING for pack in packs(bundle.schedule)):
        return bundle
    schedule = fused(bundle, bundle.schedule, left_by(bundle))
    return bundle if schedule is bundle.schedule else replace(bundle, schedule=schedule)




def fused(bundle: Bundle, schedule: Schedule, left: set[Name]) -> Schedule:
    """One scope, and those inside it; `left` is what it leaves to others. The same object if nothing moved."""
    inner = tuple(with_bodies(item, partial(fused, bundle)) if isinstance(item, Loop) else item for item in schedule)
    scope = Scope(inner, left)
    for place, item in enumerate(inner):
        if isinstance(item, Pack) and can_take(bundle, item):
            scope.move(place, scope.tail(place, item))
    changed = scope.schedule()
    return schedule if same(changed, schedule) else changed




def can_take(bundle: Bundle, pack: Pack) -> bool:
    """Whether a pack's kernel can run elementwise work, for lanes that have results of their own."""
    if pack.kernel not in FUSING or pack.epilogue or pack.form or len(pack.members) != 1:
        return False
    member = pack.members[0]
    return member.varies or bundle.families[member.family].width == 1


class Scope:
    """The items of one scope, where each value is made, and who reads it."""

    def __init__(self, items: Sequence[Item], left: set[Name]) -> None:
        self.items, self.left = items, left
        self.made: dict[Name, int] = {}  # arguments of the scope are made before everything
        self.readers: dict[Name, list[int]] = {}
        self.tails: dict[int, tuple[Step, ...]] = {}
        self.moved: set[int] = set()
        self.begin: list[int] = []  # where each item runs: with the first of its launch
        for unit in units(items):
            self.begin += [len(self.begin)] * len(unit)
        for place, item in enumerate(items):
            for f, eqn in equations(item):
                self.made.update(((f, v), place) for v in eqn.outvars)
                for atom in eqn.invars:
                    if not isinstance(atom, J.Literal):
                        self.readers.setdefault((f, atom), []).append(place)

    def tail(self, place: int, pack: Pack) -> list[int]:
        """The places of the longest tail that a pack can take, each after what it reads."""
        (member,) = pack.members
        f, start = member.family, member.eqn.outvars[0]
        inside = {(f, start)}
        chosen: list[int] = []
        best: list[int] = []
        first = min(self.readers.get((f, start), [len(self.items)]))
        for at in range(first, len(self.items)):
            step = self.items[at]
            if at in self.moved or not any((f, a) in inside for g, e in equations(step) if g == f for a in names(e)):
                continue
            columns = self.columns(step, pack, inside, self.begin[place]) if isinstance(step, Step) else None
            if columns is None or not isinstance(step, Step):
                break
            new = [*(b for b in dict.fromkeys(columns) if b not in chosen), at]
            chosen += new
            inside |= {(f, v) for b in new for _, e in equations(self.items[b]) for v in e.outvars}
            last = (f, step.eqn.outvars[0])
            whole = self.is_closed({*chosen, place}, inside, last) and J.dtype(last[1]) in DTYPES[:3]
            if whole and not widens(step.eqn):
                best = list(chosen)
        return best

    def columns(self, step: Step, pack: Pack, inside: set[Name], begin: int) -> list[int] | None:
        """The broadcasts that have to move along with a step; None if it cannot run on tiles of the pack's result."""
        eqn, shape = step.eqn, J.shape(pack.members[0].eqn.outvars[0])
        if step.each or not runs_on_tiles(eqn) or J.shape(eqn.outvars[0]) != shape:
            return None
        if any(J.dtype(a) not in DTYPES for a in [*eqn.invars, *eqn.outvars]):
            return None
        found: list[int] = []
        for atom in eqn.invars:
            if isinstance(atom, J.Literal):
                if J.shape(atom):
                    return None
                continue
            name = (step.family, atom)
            if name in inside:
                continue
            if self.is_column(name, pack, begin):
                found.append(self.made[name])
            elif self.made.get(name, -1) >= begin or not fits(J.shape(atom), pack):
                return None
        return found

    def is_column(self, name: Name, pack: Pack, begin: int) -> bool:
        """Whether a value is a broadcast, over all rows, of a number or of a vector over the pack's columns that is
        there already."""
        step = self.items[self.made[name]] if name in self.made else None
        if not isinstance(step, Step) or step.each or step.eqn.primitive.name != "broadcast_in_dim":
            return False
        vector, *sizes = step.eqn.invars
        if sizes or J.shape(step.eqn.outvars[0]) != pack.op.out.shape or J.shape(vector) == pack.op.out.shape:
            return False
        if isinstance(vector, J.Literal):
            return J.shape(vector) == ()
        if self.made.get((step.family, vector), -1) >= begin:
            return False
        if J.shape(vector) == ():
            return True
        return spans_columns(J.shape(vector), step.eqn.params["broadcast_dimensions"], pack)

    def is_closed(self, chosen: set[int], inside: set[Name], last: Name) -> bool:
        """Whether nobody else reads what lies inside, but for the last value."""
        return all(
            name == last or (name not in self.left and chosen.issuperset(self.readers.get(name, ()))) for name in inside
        )

    def move(self, place: int, tail: Sequence[int]) -> None:
        steps = [item for at in tail if isinstance(item := self.items[at], Step)]
        self.moved |= set(tail)
        self.tails[place] = tuple(steps)
        self.made.update(((s.family, v), place) for s in steps for v in s.eqn.outvars)

    def schedule(self) -> Schedule:
        out: list[Item] = []
        for place, item in enumerate(self.items):
            if place in self.moved:
                continue
            tail = self.tails.get(place)
            out.append(replace(item, epilogue=tail) if tail and isinstance(item, Pack) else item)
        return tuple(out)


def widens(eqn: J.Eqn) -> bool:
    """Whether it is a cast after which the same values take more bytes."""
    return eqn.primitive.name == "convert_element_type" and J.nbytes(eqn.outvars[0].aval) > J.nbytes(eqn.invars[0].aval)



def fits(shape: tuple[int, ...], pack: Pack) -> bool:
    """Whether an operand is a number, or has an element for each of the result or for each of its columns."""
    if shape == pack.op.out.shape or shape == ():
        return True
    return len(shape) == len(pack.op.out.shape) and (prod(shape) == 1 or spans_columns(shape, range(len(shape)), pack))


def spans_columns(vector: Sequence[int], dims: Sequence[int], pack: Pack) -> bool:
    """Whether a broadcast keeps every column of the pack's result and repeats over all of its rows."""
    op = pack.op
    shape = op.out.shape
    own = 1
    if op.kind == "dot":
        ((contracted, _), (batch, _)) = op.params["dimension_numbers"]
        own = len(op.rhs.shape) - len(batch) - len(contracted)
    columns = set(range(len(shape) - own, len(shape)))
    kept = {dim for size, dim in zip(vector, dims, strict=True) if size == shape[dim] and size > 1}
    return bool(columns) and prod(vector) == op.n and kept == {dim for dim in columns if shape[dim] > 1}
