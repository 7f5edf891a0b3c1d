"""Run two products and the work on rows between them in one kernel, which writes no scores.

Before                                                After
    pack 0 x2 dot B=4 M=8 N=8 K=4 ...: batched_dot        attention
      f0: %3:f32[1,4,8,8] = dot_general %1 %2               pack 0 x2 dot B=4 M=8 N=8 K=4 ...: batched_dot
    f0: %4:f32[1,4,8] = reduce_max %3                         f0: %3:f32[1,4,8,8] = dot_general %1 %2
    ...                                                     f0: %4:f32[1,4,8] = reduce_max %3
    pack 1 x2 dot B=4 M=8 N=4 K=8 ...: batched_dot          ...
      f0: %9:f32[1,4,8,4] = dot_general %8 %0               pack 1 x2 dot B=4 M=8 N=4 K=8 ...: batched_dot
                                                              f0: %9:f32[1,4,8,4] = dot_general %8 %0

The work on rows is elementwise equations, reductions over a row, and what brings these back to rows, with dimensions of
size one wherever a library puts them (`coalesce/attended.py`); whatever else it
reads is there before it: a mask, a bias. Nobody else reads what lies inside. A transposition of the result by its only
reader goes along. On a GPU alone, where each of these would be a kernel of its own, and as far as rows fit
(coalesce/kernels/attention.py). Products that would run by a kernel that the caller asked for stay; one that was tuned
was so by itself, which says nothing of two as one. Relies on: every pack has its kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from coalesce import jaxpr as J
from coalesce.attended import Attended, is_plain, is_single, sides
from coalesce.bundle import Attention, Bundle, equations, Item, Loop, Pack, packs, Schedule, Step
from coalesce.kernels import choose, indexed_gemm
from coalesce.kernels.attention import fits
from coalesce.kernels.mosaic import is_hopper
from coalesce.kernels.tiles import unnamed
from coalesce.passes.choose_kernels import Choice
from coalesce.passes.scopes import left_by, makers_and_readers, Name, names, with_bodies
from coalesce.reschedule import same
from coalesce.tuning import Tuned, UNTUNED

BEFORE = "batched_dot"  # the kernel of packs that may be fused so
TUNED = ("indexed_gemm", "separate")  # also where one of these was tuned
DTYPES = ("float32", "bfloat16", "float16", "bool")


def fuse_attention(bundle: Bundle, *, platform: str, choice: Choice = choose, tuned: Tuned = UNTUNED) -> Bundle:
    """On a device that `tuned` knows as one with TMA, attention may run by it."""
    kernels = (BEFORE, *TUNED) if choice is choose else (BEFORE,)
    if platform == "cpu" or sum(can_be_inside(bundle, pack, kernels) for pack in packs(bundle.schedule)) < 2:
        return bundle
    schedule = fused(bundle, bundle.schedule, left_by(bundle), kernels, is_hopper(tuned.device))
    return bundle if schedule is bundle.schedule else replace(bundle, schedule=schedule)


def fused(bundle: Bundle, schedule: Schedule, left: set[Name], kernels: Sequence[str], by_tma: bool) -> Schedule:
    """One scope, and those inside it; `left` is what it leaves to others. The same object if nothing changed."""
    body = partial(fused, bundle, kernels=kernels, by_tma=by_tma)
    inner = tuple(with_bodies(item, body) if isinstance(item, Loop) else item for item in schedule)
    scope = Scope(bundle, inner, left, kernels, by_tma)
    for place, item in enumerate(inner):
        if isinstance(item, Pack) and place not in scope.moved:
            scope.fuse(place, item)
    changed = scope.schedule()
    return schedule if same(changed, schedule) else changed


def can_be_inside(bundle: Bundle, pack: Pack, kernels: Sequence[str]) -> bool:
    """Whether a pack is a product of heads of one family, each lane's own, by one of these kernels."""
    if pack.kernel not in kernels or pack.form or pack.launch is not None or pack.epilogue or len(pack.members) != 1:
        return False
    (member,), op = pack.members, pack.op
    each = bundle.families[member.family].width == 1 or member.varies
    return each and member.weight is None and is_plain(op) and indexed_gemm.supports(unnamed(op))


class Scope:
    """The items of one scope, and who reads each value."""

    def __init__(
        self, bundle: Bundle, items: Sequence[Item], left: set[Name], kernels: Sequence[str], by_tma: bool
    ) -> None:
        self.bundle, self.items, self.left, self.kernels, self.by_tma = bundle, items, left, kernels, by_tma
        _, self.readers = makers_and_readers(items)
        self.moved: set[int] = set()
        self.instead: dict[int, Attention] = {}

    def fuse(self, place: int, scores: Pack) -> None:
        """Begin with the pack at `place`, if what follows it allows it."""
        if not can_be_inside(self.bundle, scores, self.kernels) or not is_single(sides(scores.op)[1]):
            return
        (member,) = scores.members
        f, start = member.family, member.eqn.outvars[0]
        made, steps = Attended(scores.op, start), list[int]()
        for at in range(min(self.readers.get((f, start), [len(self.items)])), len(self.items)):
            item = self.items[at]
            if at in self.moved or not any(g == f and a in made.of for g, e in equations(item) for a in names(e)):
                continue
            if isinstance(item, Step) and can_run(item) and made.follow(item.eqn):
                steps.append(at)
                continue
            if isinstance(item, Pack) and self.closes(item, made, scores) and self.is_closed(f, made, {*steps, at}):
                self.replace(place, steps, at)
            return

    def closes(self, values: Pack, made: Attended, scores: Pack) -> bool:
        """Whether a pack multiplies the weights that were made of the scores."""
        if not can_be_inside(self.bundle, values, self.kernels) or values.members[0].family != scores.members[0].family:
            return False
        left, right = (not isinstance(a, J.Literal) and a in made.of for a in values.members[0].eqn.invars)
        if left == right:
            return False
        weights, size = values.members[0].eqn.invars[right], values.op.n if left else values.op.m
        return made.values(values.op, weights, left) is not None and fits(scores.op, size)

    def is_closed(self, family: int, made: Attended, places: set[int]) -> bool:
        """Whether nobody else reads what lies inside."""
        names = [(family, v) for v in made.of]
        return all(name not in self.left and places.issuperset(self.readers.get(name, ())) for name in names)

    def replace(self, place: int, steps: Sequence[int], at: int) -> None:
        rowwise = [item for step in steps if isinstance(item := self.items[step], Step)]
        scores, values = self.items[place], self.items[at]
        assert isinstance(scores, Pack) and isinstance(values, Pack), "attention begins and ends with a pack"
        after = self.only_move(values)
        moved = [item for p in after if isinstance(item := self.items[p], Step)]
        self.moved |= {place, *steps, at, *after}
        scores, values = (replace(pack, kernel=BEFORE, blocks=None) for pack in (scores, values))
        self.instead[at] = Attention(scores, tuple(rowwise), values, tuple(moved), by_tma=self.by_tma)

    def only_move(self, values: Pack) -> list[int]:
        """The place of a transposition that alone reads a pack's result, if there is one."""
        (member,) = values.members
        name = (member.family, member.eqn.outvars[0])
        readers = self.readers.get(name, [])
        step = self.items[readers[0]] if len(readers) == 1 and name not in self.left else None
        moves = isinstance(step, Step) and not step.each and step.eqn.primitive.name == "transpose"
        return readers if moves else []

    def schedule(self) -> Schedule:
        """What runs as one stands where its last product stood: all that it reads is there."""
        kept = [
            self.instead.get(p, item) for p, item in enumerate(self.items) if p not in self.moved or p in self.instead
        ]
        return tuple(kept)


def can_run(step: Step) -> bool:
    """Whether a kernel for rows has its dtypes, and it is the same for all lanes."""
    eqn = step.eqn
    return not step.each and len(eqn.outvars) == 1 and all(J.dtype(a) in DTYPES for a in [*eqn.invars, *eqn.outvars])
