"""Name the kernel of every pack so that each weight lies in one layout, at all widths and in all request shapes.

Before                                            After, if %0 is held padded to [16, 64] or the like
    pack 0 x2 conv 3x3 M=49 N=64 K=576 ...            pack 0 x2 conv 3x3 ...: conv_slices

It takes the place of `choose_kernels` in programs that read weights from a growing bank by slot. There a kernel that
reads the bank in place saves a gather of the weights, which counts for it. `held` says in which layouts weights lie
already: a pack gets another kernel than it would without, rather than a second copy of its weight; only where no kernel
that reads such a layout supports the op does the weight lie twice. Blocks are those that were tuned for the kernel.

A float32 weight that mosaic_gemm could multiply in TF32 lies rounded to that on a device that has it, if nothing reads
it in full: some widths may run by that kernel, and others by one that reads the same layout and rounds it anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from coalesce.bundle import Bundle, Item, JointStep, Pack, packs, problems
from coalesce.costs import Costs
from coalesce.errors import PlanError
from coalesce.heavy import HeavyOp
from coalesce.kernels import choose, FUSING, KERNELS, mosaic_gemm, ON_HOPPER
from coalesce.kernels.mosaic import is_hopper
from coalesce.layout import Layout
from coalesce.reschedule import map_schedule
from coalesce.tf32 import by_element, multiplies
from coalesce.tuning import Tuned, UNTUNED
from coalesce.weigh import nbytes

OF_ONE_ROW = "indexed_matvec"
ROUNDS = "indexed_gemm"  # what it multiplies in TF32, by itself: so it reads what lies rounded as well
Held = Mapping[int, Collection[Layout]]  # of each prepared weight, as `Family.owners` numbers them


def keep_layouts(
    bundle: Bundle,
    *,
    held: Sequence[Held],
    platform: str,
    costs: Costs,
    choice: Callable[[HeavyOp, int, str], str] = choose,
    tuned: Tuned = UNTUNED,
    full: Sequence[Collection[int]] = (),
) -> Bundle:
    """`held[f]` is what is held of the weights of family f, and `full[f]` are those of them that other programs read in
    full, if any do; the rest as in `choose_kernels`."""

    several = {(m.family, m.weight) for pack in packs(bundle.schedule) for m in pack.members if pack.op.m > 1}
    exact = read_in_full(bundle) | {(f, weight) for f, weights in enumerate(full) for weight in weights}
    on_hopper = choice is choose and is_hopper(tuned.device)

    def chosen(item: Pack | JointStep) -> Item:
        assert isinstance(item, Pack) and len(item.members) == 1, "packs of several members need weights in one array"
        op, (groups, rows) = item.op, problems(item, bundle.families)
        rule = (tuned.kernel(op, groups, rows) if choice is choose else None) or choice(op, groups, platform)
        if rule not in KERNELS or not KERNELS[rule].supports(op):
            raise PlanError(f"pack {item.index} ({op.shape}): kernel {rule!r} does not support it")
        (member,) = item.members
        if member.weight is None:
            return replace(item, kernel=rule, blocks=tuned.blocks(op, groups, rows, rule))
        ((_, weight), *_) = bundle.families[member.family].owners[member.weight]
        layouts, in_full = held[member.family].get(weight, ()), (member.family, weight) in exact
        gathered = groups * nbytes(op.rhs) if member.rhs_varies or member.width == 1 else 0
        one_row = op.m * op.batch * rows == 1 and (member.family, member.weight) not in several
        stands = choice is not choose or (rule in FUSING and rule == tuned.fastest(op, groups, rows))
        flags = {"stands": stands, "one_row": one_row}
        name = kernel_for(op, groups, rows, rule, layouts, gathered, costs, **flags)
        if in_full and name in ON_HOPPER and multiplies(op) and choice is choose:
            name = ROUNDS  # which reads the layout of those that read it in full
        rounded = lies_rounded(name, op, layouts, on_hopper and not in_full)
        return replace(item, kernel=name, blocks=tuned.blocks(op, groups, rows, name), weight_rounded=rounded)

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
    stands: bool,
    one_row: bool,
) -> str:
    """The kernel whose time, with that of a gather of so many bytes if it needs one, is predicted to be least: of the
    rule's own and those that read in place, or if the rule's does not read what is held, of all that do. Of those that
    nothing was measured of, which are predicted alike, the one for dots of one row, where that is all that reads the
    weight. What the caller chose `stands` wherever it can, and what reads in place and was measured to win."""

    def may_run(name: str) -> bool:
        here = name == rule or name not in ON_HOPPER or costs.known(op, groups, rows, name) is not None
        return here and KERNELS[name].supports(op)

    able = [name for name in KERNELS if may_run(name)]
    fitting = [name for name in able if {*readable(name, op)} & {*layouts}] or able
    if rule in fitting:
        fitting = [rule] if stands else [rule, *(name for name in fitting if name in FUSING and name != rule)]

    def predicted(name: str) -> tuple[float, bool]:
        gather = 0.0 if name in FUSING else costs.stack([gathered], gathered)
        return costs.op(op, groups, rows, name) + gather, name != (OF_ONE_ROW if one_row else rule)

    return min(fitting, key=predicted)


def readable(name: str, op: HeavyOp) -> tuple[Layout, ...]:
    """The layouts in which a kernel may read a weight, the one that it asks for first."""
    own = KERNELS[name].layout(op)
    return (own, own.rounded()) if name == ROUNDS and multiplies(op) else (own,)


def lies_rounded(name: str, op: HeavyOp, layouts: Collection[Layout], may_be: bool) -> bool:
    """Whether a kernel's weight lies rounded to TF32: as it is held, or if it is not, wherever it may be that
    mosaic_gemm reads it at another width."""
    own, *others = readable(name, op)
    wanted = others[0] if others and may_be and mosaic_gemm.supports(op) else own
    lies = next((layout for layout in (own, *others) if layout in layouts), wanted)
    return lies == lies.rounded()


def read_in_full(bundle: Bundle) -> set[tuple[int, int]]:
    """(family, prepared weight) of which some op multiplies more than TF32 has."""
    return {
        (m.family, weight)
        for pack in packs(bundle.schedule)
        for m in pack.members
        if m.weight is not None and (by_element(pack.op) or not multiplies(pack.op))
        for _, weight in bundle.families[m.family].owners[m.weight]
    }
