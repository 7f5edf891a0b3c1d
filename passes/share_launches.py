"""Run independent packs of any shapes in one kernel launch: small ones, which leave a device idle, fill it together.

Before                                          After
    pack 0 x1 dot ... [family 0 at 0]               pack 0 x1 dot ...: indexed_gemm in launch 0 [family 0 at 0]
      f0: %2:f32[4,8] = dot_general %1 %0             f0: %2:f32[4,8] = dot_general %1 %0
    f0: %3:f32[4,8] = tanh %2                       pack 1 x1 conv ...: indexed_gemm in launch 0 [family 1 at 0]
    pack 1 x1 conv ... [family 1 at 0]                f1: %2:f32[1,5,5,4] = conv_general_dilated %1 %0
      f1: %2:f32[1,5,5,4] = conv_gener...           f0: %3:f32[4,8] = tanh %2

Nothing is padded, moved or stacked for it, so all that counts is what the kernel wins (coalesce/kernels/horizontal.py).
Equations run as early as they can; then comes the pack or loop that is least far into its family's program, with those
of the other packs that could run now that win most in one launch with it. So no launch waits for itself. Relies on:
every pack has its kernel. Gives: packs of one launch stand side by side, and none reads what another computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from coalesce.bundle import Bundle, Item, JointStep, Pack, packs, Place, place_of, problems, Schedule, units
from coalesce.costs import Costs
from coalesce.kernels import horizontal, indexed_gemm
from coalesce.passes.run_order import RunOrder
from coalesce.record import Launched
from coalesce.reschedule import map_bodies, map_schedule, same
from coalesce.tuning import Tuned, UNTUNED
from coalesce.weigh import MayLaunch, no_launch

KERNEL = "indexed_gemm"  # whose products the horizontal kernel runs


def share_launches(
    bundle: Bundle,
    *,
    costs: Costs,
    policy: str = "auto",
    within_program: bool = False,
    may_launch: MayLaunch = no_launch,
    tuned: Tuned = UNTUNED,
) -> Bundle:
    """With policy "auto" packs share a launch where `costs` predict a gain, with "always" where they can: packs of that
    kernel, and others that `may_launch`, which get it. Those of one family share one only `within_program`."""
    if any(pack.launch is not None for pack in packs(bundle.schedule)):
        return bundle
    if len(bundle.families) < 2 and not within_program:
        return bundle
    sharing = Sharing(bundle, costs, policy, within_program, may_launch, tuned)
    schedule = arranged(bundle.schedule, sharing)
    if schedule is bundle.schedule:
        return bundle
    return recorded(replace(bundle, schedule=numbered(schedule)), sharing)


@dataclass(frozen=True)
class Sharing:
    """Which packs share a launch, of those that could run at one time."""

    bundle: Bundle
    costs: Costs
    policy: str
    within_program: bool
    may_launch: MayLaunch
    tuned: Tuned

    def company(self, first: Item, ready: Sequence[Item]) -> list[Item]:
        """`first`, and those of the ready ones that run with it."""
        chosen: list[Item] = [first]
        others = [item for item in ready if item is not first and self.may_share(item)]
        found = self.may_share(first)
        while found and len(chosen) < horizontal.MOST:
            tried = [[*chosen, other] for other in others if self.fits(chosen, other)]
            best = max(tried, key=self.worth, default=chosen)
            found = self.worth(best) > self.worth(chosen)
            chosen = best if found else chosen
        return chosen

    def may_share(self, item: Item) -> bool:
        if not isinstance(item, Pack) or not indexed_gemm.supports(item.op):
            return False
        return item.kernel == KERNEL or self.may_launch(item, self.bundle.families)

    def fits(self, chosen: Sequence[Any], other: Any) -> bool:
        if any(pack is other or pack.op.context != other.op.context for pack in chosen):
            return False
        return self.within_program or not any(set(pack.families) & set(other.families) for pack in chosen)

    def worth(self, chosen: Sequence[Any]) -> float:
        if self.policy == "always":
            return float(len(chosen))
        if len(chosen) == 1:
            return 0.0
        times = self.times(chosen)
        return times.gain_us - self.costs.margin * times.apart_us

    def launched(self, pack: Pack, launch: int) -> Pack:
        blocks = self.tuned.blocks(pack.op, *problems(pack, self.bundle.families), KERNEL)
        return replace(pack, kernel=KERNEL, blocks=blocks, launch=launch)

    def times(self, chosen: Sequence[Pack]) -> Launched:
        sizes = [(pack.op, *problems(pack, self.bundle.families)) for pack in chosen]
        # A pack that another kernel would run as fast alone gains nothing by the change of kernel.
        apart = sum(
            min(self.costs.op(*size, kernel=pack.kernel), self.costs.op(*size, kernel=KERNEL))
            for pack, size in zip(chosen, sizes, strict=True)
        )
        return Launched(tuple(map(place_of, chosen)), self.costs.together(sizes), apart)


def arranged(scope: Schedule, sharing: Sharing) -> Schedule:
    """The scope in another order, with launches; the same object if there are none. A launch has the number of one of
    its packs."""
    inner = tuple(map_bodies(item, lambda body: arranged(body, sharing)) for item in scope)
    order = RunOrder(inner)
    out: list[Item] = []
    shared = False
    while (first := order.first()) is not None:
        unit = sharing.company(first, order.heavy)
        shared |= len(unit) > 1
        for item in unit:
            order.issue(item)
            if isinstance(item, Pack) and len(unit) > 1:
                item = sharing.launched(item, min(p.index for p in unit if isinstance(p, Pack)))
            out.append(item)
    if shared:
        return tuple(out)
    return scope if same(inner, scope) else inner


def numbered(schedule: Schedule) -> Schedule:
    """Packs in the order of the schedule, launches by their first."""
    numbers = count()
    first: dict[int, int] = {}

    def one(item: Pack | JointStep) -> Item:
        if isinstance(item, JointStep):
            return item
        index = next(numbers)
        launch = None if item.launch is None else first.setdefault(item.launch, index)
        return replace(item, index=index, launch=launch)

    return map_schedule(schedule, one)


def recorded(bundle: Bundle, sharing: Sharing) -> Bundle:
    """With what each launch is predicted to win, in the record of each of its packs."""
    records, won = dict(bundle.records), bundle.predicted_us
    for unit in units(packs(bundle.schedule)):
        if len(unit) > 1:
            times = sharing.times(unit)
            won += times.gain_us
            records.update((p, replace(records[p], launched=times)) for p in places(unit) if p in records)
    return replace(bundle, records=records, predicted_us=won)


def places(unit: Sequence[Pack]) -> list[Place]:
    """The places that have a record: those of the packs that `align` saw."""
    return [(m.family, m.site) for pack in unit for m in pack.members]
