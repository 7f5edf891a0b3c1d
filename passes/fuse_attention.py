"""Run two products and the work on rows between them in one kernel, which writes no scores.

Before                                                After
    pack 0 x2 dot B=4 M=8 N=8 K=4 ...: batched_dot        attention
      f0: %3:f32[1,4,8,8] = dot_general %1 %2               pack 0 x2 dot B=4 M=8 N=8 K=4 ...: batched_dot
    f0: %4:f32[1,4,8] = reduce_max %3                         f0: %3:f32[1,4,8,8] = dot_general %1 %2
    ...                                                     f0: %4:f32[1,4,8] = reduce_max %3
    pack 1 x2 dot B=4 M=8 N=4 K=8 ...: batched_dot          ...
      f0: %9:f32[1,4,8,4] = dot_general %8 %0               pack 1 x2 dot B=4 M=8 N=4 K=8 ...: batched_dot
                                                              f0: %9:f32[1,4,8,4] = dot_general %8 %0

The work on rows is elementwise equations, reductions over a row, and what brings these back to rows; whatever else it
reads is there before it: a mask, a bias. Nobody else reads what lies inside. A transposition of the result by its only
reader goes along. On a GPU alone, where each of these would be a kernel of its own, and as far as rows fit
(coalesce/kernels/attention.py). Products that would run by a kernel that the caller asked for stay; one that was tuned
was so by itself, which says nothing of two as one. Relies on: every pack has its kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from coalesce import jaxpr as J
from coalesce.bundle import Attention, Bundle, equations, Item, Loop, Pack, packs, Schedule, Step
from coalesce.kernels import choose, indexed_gemm
from coalesce.kernels.attention import fits, REDUCTIONS, SAME
from coalesce.kernels.epilogue import runs_on_tiles
from coalesce.kernels.mosaic import is_hopper
from coalesce.passes.choose_kernels import Choice
from coalesce.passes.scopes import left_by, makers_and_readers, Name, names, with_bodies
from coalesce.reschedule import same
from coalesce.tuning import Tuned, UNTUNED

BEFORE = "batched_dot"  # the kernel of packs that may be fused so, also where another one was tuned
TUNED = "indexed_gemm"
DTYPES = ("float32", "bfloat16", "float16", "bool")
WHOLE, NUMBER, TURNED = "whole", "number", "turned"  # a value for each score, for each row, and scores transposed


def fuse_attention(bundle: Bundle, *, platform: str, choice: Choice = choose, tuned: Tuned = UNTUNED) -> Bundle:
    """On a device that `tuned` knows as one with TMA, attention may run by it."""
    kernels = (BEFORE, TUNED) if choice is choose else (BEFORE,)
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
    """Whether a pack is a product [B.., M, K] x [B.., K, N] of one family, each lane's own, by one of these kernels."""
    if pack.kernel not in kernels or pack.form or pack.launch is not None or pack.epilogue or len(pack.members) != 1:
        return False
    (member,), op = pack.members, pack.op
    each = bundle.families[member.family].width == 1 or member.varies
    if not each or op.kind != "dot" or member.weight is not None or not indexed_gemm.supports(op):
        return False
    batch = len(op.out.shape) - 2
    ((contracted, _), (own, _)) = op.params["dimension_numbers"]
    plain = own == tuple(range(batch)) and contracted == (batch + 1,)
    return plain and len(op.lhs.shape) == len(op.rhs.shape) == batch + 2


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
        if not can_be_inside(self.bundle, scores, self.kernels):
            return
        (member,) = scores.members
        f, start = member.family, member.eqn.outvars[0]
        kinds, steps = {start: WHOLE}, list[int]()
        for at in range(min(self.readers.get((f, start), [len(self.items)])), len(self.items)):
            item = self.items[at]
            if at in self.moved or not any(g == f and a in kinds for g, e in equations(item) for a in names(e)):
                continue
            if isinstance(item, Step) and (kind := kind_of(item, kinds, scores)):
                kinds[item.eqn.outvars[0]] = kind
                steps.append(at)
                continue
            if isinstance(item, Pack) and self.closes(item, kinds, scores) and self.is_closed(f, kinds, {*steps, at}):
                self.replace(place, steps, at)
            return

    def closes(self, values: Pack, kinds: dict[Any, str], scores: Pack) -> bool:
        """Whether a pack multiplies the weights that were made of the scores."""
        if not can_be_inside(self.bundle, values, self.kernels) or values.members[0].family != scores.members[0].family:
            return False
        left, right = (None if isinstance(a, J.Literal) else kinds.get(a) for a in values.members[0].eqn.invars)
        batch, (*heads, m, n) = len(scores.op.out.shape) - 2, scores.op.out.shape
        if left == WHOLE and right is None:
            return (
                values.op.lhs.shape == (*heads, m, n)
                and len(values.op.out.shape) == batch + 2
                and fits(scores.op, values.op.n)
            )
        if right == TURNED and left is None:
            return values.op.rhs.shape == (*heads, n, m) and fits(scores.op, values.op.m)
        return False

    def is_closed(self, family: int, inside: dict[Any, str], places: set[int]) -> bool:
        """Whether nobody else reads what lies inside."""
        names = [(family, v) for v in inside]
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


def kind_of(step: Step, kinds: dict[Any, str], scores: Pack) -> str | None:
    """What a step makes of what lies inside; None if it cannot run on rows."""
    eqn, shape = step.eqn, scores.op.out.shape
    if step.each or len(eqn.outvars) != 1 or any(J.dtype(a) not in DTYPES for a in [*eqn.invars, *eqn.outvars]):
        return None
    name, out = eqn.primitive.name, J.shape(eqn.outvars[0])
    read = {kinds[a] for a in names(eqn) if a in kinds}
    if TURNED in read:
        return None
    if name == "transpose":
        batch = len(shape) - 2
        turns = tuple(eqn.params["permutation"]) == (*range(batch), batch + 1, batch)
        return TURNED if turns and read == {WHOLE} else None
    if name in REDUCTIONS:
        along_rows = tuple(eqn.params["axes"]) == (len(shape) - 1,) and read == {WHOLE}
        return NUMBER if along_rows and J.dtype(eqn.outvars[0]) != "bool" else None
    if name in SAME:
        if len(eqn.invars) > 1 or (name == "broadcast_in_dim" and not keeps_rows(eqn, shape)):
            return None
        return kind_by_shape(out, shape) if read == {NUMBER} else WHOLE if out == shape else None
    if not runs_on_tiles(eqn) or not all(fits_tile(a, kinds, shape, out) for a in eqn.invars):
        return None
    return WHOLE if WHOLE in read and out == shape else kind_by_shape(out, shape)


def kind_by_shape(out: tuple[int, ...], shape: tuple[int, ...]) -> str | None:
    """A number for each row, or one that is spread over its row."""
    if out in (shape[:-1], (*shape[:-1], 1)):
        return NUMBER
    return WHOLE if out == shape else None


def keeps_rows(eqn: J.Eqn, shape: tuple[int, ...]) -> bool:
    """Whether a broadcast leaves the dimensions of heads and rows where they are."""
    dims = tuple(eqn.params["broadcast_dimensions"])
    return dims == tuple(range(len(dims))) and len(dims) >= len(shape) - 1


def fits_tile(atom: J.Atom, kinds: dict[Any, str], shape: tuple[int, ...], out: tuple[int, ...]) -> bool:
    """Whether an operand is of the inside, a number, or has for each head, row and column an element or one for all."""
    own = J.shape(atom)
    if own == () or (not isinstance(atom, J.Literal) and atom in kinds):
        return True
    if isinstance(atom, J.Literal) or len(own) != len(shape) or len(out) != len(shape):
        return False
    return all(size in (1, whole) for size, whole in zip(own, shape, strict=True))
