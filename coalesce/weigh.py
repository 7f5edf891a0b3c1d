"""What it would cost to run packs of several families as one superkernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from coalesce.bundle import Pack, problems
from coalesce.costs import Costs
from coalesce.family import Family
from coalesce.kernels import choose, indexed_gemm
from coalesce.member import fold, Member, stacked_fold
from coalesce.tuning import Tuned, UNTUNED
from coalesce.unify import FORMS, Unified, unify

MayLaunch = Callable[[Pack, Sequence[Family]], bool]  # whether a pack may share a launch


@dataclass(frozen=True)
class Weighed:
    """A superkernel that packs could share, and its predicted times in microseconds."""

    shared: Unified
    waste: float  # of the member that wastes most
    parts_us: float  # the packs one by one
    packed_us: float
    movement_us: float  # padding and stacking operands that are no weights, if none is stacked already
    tails_us: float  # what stacked results save: one kernel a tail instead of one a pack

    @property
    def gain_us(self) -> float:
        return self.parts_us - self.packed_us - self.movement_us

    @property
    def stacked_us(self) -> float:
        """What it wins more if its operands arrive stacked."""
        return self.movement_us + self.tails_us if self.shared.form != "product" else 0.0


def weigh(packs: Sequence[Pack], families: Sequence[Family], costs: Costs, waste_bound: float) -> Weighed | None:
    """The first form in which no member wastes more than the bound; None if there is none."""
    members = tuple(m for pack in packs for m in pack.members)
    if any(not m.varies or m.op.empty for m in members) or len({m.weight is None for m in members}) > 1:
        return None
    rows = [fold(m, families[m.family]).per_group for m in members]
    for form in FORMS:
        shared = unify([m.op for m in members], rows, (form,))
        if shared is None or (form == "product" and any(m.weight is not None and m.op.batch > 1 for m in members)):
            continue
        whole = Pack(0, members, shared.op, form)
        if form == "product":
            waste = max(shared.waste(m.op, r) for m, r in zip(members, rows, strict=True))
        else:
            waste = stacked_waste(whole, families)
        if waste > waste_bound:
            continue
        places = problems(whole, families)
        packed = costs.op(shared.op, *places)
        parts = sum(costs.op(pack.op, *problems(pack, families)) for pack in packs)
        tails = costs.launch * (len(packs) - 1)
        return Weighed(shared, waste, parts, packed, movement(whole, prod(places), costs), tails)
    return None


def can_launch(
    pack: Pack, families: Sequence[Family], *, choice: Callable[..., str], platform: str, tuned: Tuned = UNTUNED
) -> bool:
    """Whether a pack may share a launch with others, of any shapes: one whose kernel can, by `choice`; and where that
    goes by rule, any that such a kernel is likely to run as well as its own.

    One row is bound by how fast its weights come in, which the tiles of a launch are too few to read. Products of
    attention take part in what XLA fuses around them, transposes and softmax, which a launch would cut off.
    """
    groups, rows = problems(pack, families)
    by_rule = choice is choose
    kernel = tuned.kernel(pack.op, groups, rows) if by_rule else None
    if (kernel or choice(pack.op, groups, platform)) == "indexed_gemm":
        return True
    return by_rule and indexed_gemm.supports(pack.op) and pack.op.m * rows > 1 and pack.op.batch == 1


def no_launch(pack: Pack, families: Sequence[Family]) -> bool:
    return False


def stacked_waste(whole: Pack, families: Sequence[Family]) -> float:
    """The padding of the member that wastes most: of its shape, and of places that repeat one of its lanes since other
    weights are shared by more lanes."""
    how = stacked_fold(whole.members, families)
    owner = [i for i, m in enumerate(whole.members) for _ in range(m.width)]
    lanes_in = Counter(place // how.per_group for place in how.place)
    worst = 0.0
    for i, m in enumerate(whole.members):
        own = Counter(place // how.per_group for place, lane_of in zip(how.place, owner, strict=True) if lane_of == i)
        spent = sum(how.per_group - lanes_in[group] + lanes for group, lanes in own.items())
        worst = max(worst, 1 - m.width * m.op.flops / (spent * whole.op.flops))
    return worst


def movement(whole: Pack, places: int, costs: Costs) -> float:
    """Microseconds to bring operands that are no weights into one stack of so many places."""
    members, product = whole.members, whole.form == "product"
    own = [m.width * (matrix_bytes(m) if product else nbytes(m.op.lhs)) for m in members]
    us = costs.stack(own, places * nbytes(whole.op.lhs))
    if product:
        us += sum(costs.patches(m.op, m.width) for m in members if m.op.kind == "conv")
    if any(m.weight is None for m in members):
        us += costs.stack([m.width * nbytes(m.op.rhs) for m in members], places * nbytes(whole.op.rhs))
    return us


def matrix_bytes(member: Member) -> int:
    op = member.op
    return op.batch * op.m * op.k * op.lhs.dtype.itemsize


def nbytes(struct: Any) -> int:
    return prod(struct.shape) * struct.dtype.itemsize
