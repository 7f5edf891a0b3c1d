"""Name the kernel of every pack so that each weight lies in one layout, at all widths and in all request shapes.

Before                                            After, if %0 is held padded to [16, 64] or the like
    pack 0 x2 conv 3x3 M=49 N=64 K=576 ...            pack 0 x2 conv 3x3 ...: conv_slices

It takes the place of `choose_kernels` in programs that read weights from a growing bank by slot. There a kernel that
reads the bank in place saves a gather of the weights, which counts for it. `held` says in which layouts weights lie
already: a pack gets another kernel than it would without, rather than a second copy of its weight; only where no kernel
that reads such a layout supports the op does the weight lie twice. Blocks are those that were tuned for the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from coalesce.bundle import Bundle, Item, JointStep, Pack, packs, problems
from coalesce.costs import Costs
from coalesce.errors import PlanError
from coalesce.heavy import HeavyOp
from coalesce.kernels import choose, FUSING, KERNELS, ON_HOPPER
from coalesce.layout import Layout
from coalesce.reschedule import map_schedule
from coalesce.tf32 import multiplies
from coalesce.tuning import Tuned, UNTUNED
from coalesce.weigh import nbytes

OF_ONE_ROW = "indexed_matvec"
Held = Mapping[int, Collection[Layout]]  # of each prepared weight, as `Family.owners` numbers them


def keep_layouts(
    bundle: Bundle,
    *,
    held: Sequence[Held],
    platform: str,
    costs: Costs,
    choice: Callable[[HeavyOp, int, str], str] = choose,
    tuned: Tuned = UNTUNED,
) -> Bundle:
    """`held[f]` is what is held of the weights of family f; the rest as in `choose_kernels`."""

    several = {(m.family, m.weight) for pack in packs(bundle.schedule) for m in pack.members if pack.op.m > 1}

    def chosen(item: Pack | JointStep) -> Item:
        assert isinstance(item, Pack) and len(item.members) == 1, "packs of several members need weights in one array"
        op, (groups, rows) = item.op, problems(item, bundle.families)
        rule = (tuned.kernel(op, groups, rows) if choice is choose else None) or choice(op, groups, platform)
        if choice is choose and rule in ON_HOPPER and multiplies(op):
            rule = "indexed_gemm"  # which reads no rounded weights, and what wrote its operand need not round that
        if rule not in KERNELS or not KERNELS[rule].supports(op):
            raise PlanError(f"pack {item.index} ({op.shape}): kernel {rule!r} does not support it")
        (member,) = item.members
        if member.weight is None:
            name = rule
        else:
            ((_, weight), *_) = bundle.families[member.family].owners[member.weight]
            layouts = held[member.family].get(weight, ())
            gathered = groups * nbytes(op.rhs) if member.rhs_varies or member.width == 1 else 0
            one_row = op.m * op.batch * rows == 1 and (member.family, member.weight) not in several
            flags = {"by_rule": choice is choose, "one_row": one_row}
            name = kernel_for(op, groups, rows, rule, layouts, gathered, costs, **flags)
        return replace(item, kernel=name, blocks=tuned.blocks(op, groups, rows, name))

    schedule = map_schedule(bundle.schedule, chosen)
    return bundle if schedule is bundle.schedule else replace(bundle, schedule=schedule)


def kernel_for(
    op: HeavyOp,
    groups: int,
    rows: int,
    rule: str,
    layouts: Collection[Layout],
    gathered: int,
    costs: Costs,
    *,
    by_rule: bool,
    one_row: bool,
) -> str:
    """The kernel whose time, with that of a gather of so many bytes if it needs one, is predicted to be least: of the
    rule's own and those that read in place, or if the rule's does not read what is held, of all that do. Of those that
    nothing was measured of, which are predicted alike, the one for dots of one row, where that is all that reads the
    weight. A choice that the caller made stands wherever it can."""
    able = [name for name in KERNELS if KERNELS[name].supports(op) and (name == rule or name not in ON_HOPPER)]
    fitting = [name for name in able if KERNELS[name].layout(op) in layouts] or able
    if rule in fitting:
        fitting = [rule, *(name for name in fitting if name in FUSING and name != rule)] if by_rule else [rule]

    def predicted(name: str) -> tuple[float, bool]:
        gather = 0.0 if name in FUSING else costs.stack([gathered], gathered)
        return costs.op(op, groups, rows, name) + gather, name != (OF_ONE_ROW if one_row else rule)

    return min(fitting, key=predicted)
