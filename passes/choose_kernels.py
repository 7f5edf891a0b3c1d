"""Name the kernel of every pack: the one place that a choice is made, and the place of a tuning database.

Before                                            After
    pack 0 x16 conv 3x3 M=3136 N=64 K=576 ...         pack 0 x16 conv 3x3 ...: conv_slices
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coalesce.bundle import Bundle, fold, map_packs, packs
from coalesce.errors import PlanError
from coalesce.heavy import HeavyOp
from coalesce.kernels import choose, KERNELS

Choice = Callable[[HeavyOp, int, str], str]


def choose_kernels(bundle: Bundle, *, platform: str, choice: Choice = choose) -> Bundle:
    """`choice(op, groups, platform)` names the kernel for `groups` problems of `op`; it must support the op."""
    new = {}
    for pack in packs(bundle.schedule):
        groups = sum(fold(m, bundle.families[m.family]).groups for m in pack.members)
        name = choice(pack.members[0].op, groups, platform)
        if name not in KERNELS or not KERNELS[name].supports(pack.members[0].op):
            raise PlanError(
                f"pack {pack.index} ({pack.members[0].op.shape}): kernel {name!r} does not support it; kernels that "
                f"do: {', '.join(k for k, kernel in KERNELS.items() if kernel.supports(pack.members[0].op))}"
            )
        new[pack.index] = pack if name == pack.kernel else replace(pack, kernel=name)
    if all(new[pack.index] is pack for pack in packs(bundle.schedule)):
        return bundle
    return replace(bundle, schedule=map_packs(bundle.schedule, new))
