"""Run what is done to rows between heavy ops in one kernel, which reads them once: a norm, say.

Before                                        After
    f0: %3:f32[1,8] = reduce_sum %2             rows
    f0: %4:f32[1,8,1] = reshape %3                f0: %3:f32[1,8] = reduce_sum %2
    f0: %5:f32[1,8,16] = square %2                f0: %4:f32[1,8,1] = reshape %3
    f0: %6:f32[1,8] = reduce_sum %5               f0: %5:f32[1,8,16] = square %2
    ...                                           ...
    f0: %9:f32[1,8,16] = mul %8 %0                f0: %9:f32[1,8,16] = mul %8 %0
    pack 0 x2 dot M=8 N=32 K=16 ...               then it leaves %9
      f0: %10:f32[1,8,32] = dot_general %9 %1   pack 0 x2 dot M=8 N=32 K=16 ...
                                                  f0: %10:f32[1,8,32] = dot_general %9 %1

On a GPU alone, and for rows that XLA reads twice: it makes one kernel of reductions each of which reads the one before
it (a softmax, a norm by the mean of squares, or by the mean and then the variance), and two of a norm by the mean and
the mean of squares. What is elementwise goes along: before it, where nothing but what kernels of ours, products or
arguments leave is read; a cast that widens, so that half as much is; behind it, up to whoever cannot. Rows that a slice
leaves out are not computed. Of a result that mosaic_gemm multiplies in TF32 it leaves the rounded numbers, as
themselves too where somebody else reads it. In a loop that is one, rows that are few stay. Relies on: kernels are
chosen, and epilogues are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod

from coalesce import jaxpr as J
from coalesce.bundle import Bundle, Item, Loop, Pack, Rowwise, Schedule, Step
from coalesce.kernels.attention import REDUCTIONS
from coalesce.kernels.epilogue import runs_on_tiles
from coalesce.kernels.rows import LONGEST
from coalesce.passes.round_results import cuts
from coalesce.passes.row_groups import Group, moves, runs
from coalesce.passes.scopes import left_by, makers_and_readers, Name, names, with_bodies
from coalesce.reschedule import same

SHORTEST = 32  # columns: a warp
IN_LOOPS = 16  # rows of a lane


def fuse_rows(bundle: Bundle, *, platform: str) -> Bundle:
    if platform == "cpu":
        return bundle
    schedule = fused(bundle.schedule, left_by(bundle))
    return bundle if schedule is bundle.schedule else replace(bundle, schedule=schedule)


def fused(schedule: Schedule, left: set[Name], fewest: int = 1) -> Schedule:
    """One scope, and those inside it; `left` is what it leaves to others. The same object if nothing changed."""

    def within(item: Item) -> Item:
        if not isinstance(item, Loop):
            return item
        return with_bodies(item, partial(fused, fewest=fewest if item.unrolled else IN_LOOPS))

    scope = Scope(tuple(map(within, schedule)), left)
    for place, item in enumerate(scope.items):
        if isinstance(item, Step) and place not in scope.moved and begins(item, fewest):
            scope.fuse(place, item)
    changed = scope.schedule()
    return schedule if same(changed, schedule) else changed


def begins(step: Step, fewest: int) -> bool:
    """Whether it is a reduction of rows that are worth a kernel."""
    if step.eqn.primitive.name not in REDUCTIONS:
        return False
    shape = J.shape(step.eqn.invars[0])
    return bool(shape) and SHORTEST <= shape[-1] <= LONGEST and prod(shape[:-1]) >= fewest and runs(step, shape)


class Scope:
    """The items of one scope, where each value is made, and who reads it."""

    def __init__(self, items: Sequence[Item], left: set[Name]) -> None:
        self.items, self.left = items, left
        self.made, self.readers = makers_and_readers(items)  # arguments of the scope are made before everything
        self.moved: set[int] = set()
        self.before: dict[int, list[Item]] = {}  # what stands before an item
        self.packs: dict[int, Pack] = {}  # that read rounded numbers
        self.known: list[bool] = []

    def there(self, name: Name) -> bool:
        """Whether no kernel of XLA has to run for a value: an argument, what kernels leave or read anyway, elementwise
        work on such values, or a part of one."""
        at = self.made.get(name, -1)
        for place in range(len(self.known), at + 1):
            item = self.items[place]
            if not isinstance(item, Step) or place in self.moved or self.is_written(item):
                self.known.append(True)
                continue
            free = not item.each and (moves(item.eqn) or runs_on_tiles(item.eqn))
            before = (self.made.get((item.family, a), -1) for a in names(item.eqn))
            self.known.append(free and all(p < 0 or self.known[p] for p in before))
        return at < 0 or self.known[at]

    def is_written(self, step: Step) -> bool:
        """Whether a kernel reads what a step computes."""
        readers = (r for v in step.eqn.outvars for r in self.readers.get((step.family, v), ()))
        return any(r in self.moved or isinstance(self.items[r], Pack) for r in readers)

    def fuse(self, place: int, first: Step) -> None:
        """Begin with the reduction at `place`, if what it reads and who reads it allow it."""
        group = Group(self, place, first)
        if not group.grow() or not group.side_by_side():
            return
        behind = group.trim()
        left, at, family = group.left(), group.stands(behind), first.family
        if not left or at is None:
            return
        if (part := group.part(left)) is not None:
            group.places.add(part)
            left = [v for _, v in group.gives(part)]
        self.moved |= {*group.places, *behind}
        steps = {p: step for p in (*group.places, *behind) if isinstance(step := self.items[p], Step)}
        rounded = tuple(v for v in left if self.rounding((family, v)))
        results = tuple(v for v in left if not self.rounds_all((family, v)))
        inside = tuple(steps[p] for p in sorted(group.places))
        self.before.setdefault(at, []).extend([Rowwise(inside, results, rounded), *(steps[p] for p in sorted(behind))])
        for reader in (r for v in rounded for r in self.rounding((family, v))):
            self.packs[reader] = replace(self.pack(reader), rounded=True)
        del self.known[min(steps) :]

    def pack(self, at: int) -> Pack:
        item = self.items[at]
        assert isinstance(item, Pack), f"a product that is no pack: {item}"
        return item

    def rounding(self, name: Name) -> list[int]:
        """The packs that multiply a value and would cut off what TF32 has no place for."""
        if J.dtype(name[1]) != "float32":
            return []
        return [at for at in dict.fromkeys(self.readers.get(name, ())) if self.cuts(at, name)]

    def cuts(self, at: int, name: Name) -> bool:
        item = self.items[at]
        if not isinstance(item, Pack) or item.form or item.launch is not None or len(item.members) != 1:
            return False
        return cuts(item) and item.members[0].eqn.invars[0] is name[1]

    def rounds_all(self, name: Name) -> bool:
        """Whether nobody reads a value but as the left operand of these packs."""
        return name not in self.left and 0 < len(self.rounding(name)) == len(self.readers[name])

    def schedule(self) -> Schedule:
        found: list[Item] = []
        for at, item in enumerate(self.items):
            found += self.before.get(at, ())
            found += [] if at in self.moved else [self.packs.get(at, item)]
        return tuple(found)
