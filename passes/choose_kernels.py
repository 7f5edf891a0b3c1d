"""Name the kernel of every pack: the one place that a choice is made, and the place of a tuning database.

Before                                            After
    pack 0 x16 conv 3x3 M=3136 N=64 K=576 ...         pack 0 x16 conv 3x3 ...: conv_slices
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coalesce.bundle import Bundle, Item, JointStep, map_schedule, Pack, problems
from coalesce.errors import PlanError
from coalesce.heavy import HeavyOp
from coalesce.kernels import choose, KERNELS

Choice = Callable[[HeavyOp, int, str], str]


def choose_kernels(bundle: Bundle, *, platform: str, choice: Choice = choose) -> Bundle:
    """`choice(op, groups, platform)` names the kernel for `groups` problems of `op`; it must support the op."""

    def chosen(item: Pack | JointStep) -> Item:
        if isinstance(item, JointStep):
            return item
        groups, _ = problems(item, bundle.families)
        name = choice(item.op, groups, platform)
        if name not in KERNELS or not KERNELS[name].supports(item.op):
            raise PlanError(
                f"pack {item.index} ({item.op.shape}): kernel {name!r} does not support it; kernels that "
                f"do: {', '.join(k for k, kernel in KERNELS.items() if kernel.supports(item.op))}"
            )
        return item if name == item.kernel else replace(item, kernel=name)

    schedule = map_schedule(bundle.schedule, chosen)
    return bundle if schedule is bundle.schedule else replace(bundle, schedule=schedule)
