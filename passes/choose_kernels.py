"""Name the kernel of every pack: the one place that a choice is made, and the place of a tuning database.

Before                                            After
    pack 0 x16 conv 3x3 M=3136 N=64 K=576 ...         pack 0 x16 conv 3x3 ...: conv_slices
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coalesce.bundle import Bundle, map_packs, packs, problems
from coalesce.errors import PlanError
from coalesce.heavy import HeavyOp
from coalesce.kernels import choose, KERNELS

Choice = Callable[[HeavyOp, int, str], str]


def choose_kernels(bundle: Bundle, *, platform: str, choice: Choice = choose) -> Bundle:
    """`choice(op, groups, platform)` names the kernel for `groups` problems of `op`; it must support the op."""
    new = {}
    for pack in packs(bundle.schedule):
        groups, _ = problems(pack, bundle.families)
        name = choice(pack.op, groups, platform)
        if name not in KERNELS or not KERNELS[name].supports(pack.op):
            raise PlanError(
                f"pack {pack.index} ({pack.op.shape}): kernel {name!r} does not support it; kernels that "
                f"do: {', '.join(k for k, kernel in KERNELS.items() if kernel.supports(pack.op))}"
            )
        new[pack.index] = pack if name == pack.kernel else replace(pack, kernel=name)
    if all(new[pack.index] is pack for pack in packs(bundle.schedule)):
        return bundle
    return replace(bundle, schedule=map_packs(bundle.schedule, new))
