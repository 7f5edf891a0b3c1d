"""Name the kernel of every pack, and its blocks where they were tuned: the one place that a choice is made.

Before                                            After
    pack 0 x16 conv 3x3 M=3136 N=64 K=576 ...         pack 0 x16 conv 3x3 ...: conv_slices

What was measured on the device goes before the rule, and a rule that the caller gives before both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coalesce.bundle import Bundle, Item, JointStep, Pack, problems
from coalesce.errors import PlanError
from coalesce.heavy import HeavyOp
from coalesce.kernels import choose, KERNELS
from coalesce.reschedule import map_schedule
from coalesce.tuning import Tuned, UNTUNED

Choice = Callable[[HeavyOp, int, str], str]


def choose_kernels(bundle: Bundle, *, platform: str, choice: Choice = choose, tuned: Tuned = UNTUNED) -> Bundle:
    """`choice(op, groups, platform)` names the kernel for `groups` problems of `op`; it must support the op."""

    def chosen(item: Pack | JointStep) -> Item:
        if isinstance(item, JointStep):
            return item
        groups, rows = problems(item, bundle.families)
        name = tuned.kernel(item.op, groups, rows) if choice is choose else None
        name = name or choice(item.op, groups, platform)
        if name not in KERNELS or not KERNELS[name].supports(item.op):
            raise PlanError(
                f"pack {item.index} ({item.op.shape}): kernel {name!r} does not support it; kernels that "
                f"do: {', '.join(k for k, kernel in KERNELS.items() if kernel.supports(item.op))}"
            )
        blocks = tuned.blocks(item.op, groups, rows, name)
        return item if (name, blocks) == (item.kernel, item.blocks) else replace(item, kernel=name, blocks=blocks)

    schedule = map_schedule(bundle.schedule, chosen)
    return bundle if schedule is bundle.schedule else replace(bundle, schedule=schedule)
