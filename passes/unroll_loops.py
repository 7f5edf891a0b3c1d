"""Run the steps of a scan one after the other, without a loop, where a step is short.

Before                                                After
    f0: %5 = scan %1 %2 %4 [length=25 ...]                f0: %5 = scan %1 %2 %4 [length=25 ...], unrolled

A GPU launches a loop's kernels anew in every step, and the loop's own besides, while those of a program without a loop
are one CUDA graph. That counts where a step takes no longer than a few launches, as in a recurrent network of batch 1:
8 LSTMs of 25 steps took 481 us instead of 585 on an H100. By the cost model: on a CPU, where a step costs nothing by
itself, all loops stay, and so do those whose steps have more than MOST equations in all, which would be compiled for
long.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from coalesce import jaxpr as J
from coalesce.bundle import Bundle, Item, JointLoop, Loop, Schedule
from coalesce.costs import Costs
from coalesce.costs.program import equations_us
from coalesce.reschedule import map_bodies, same

MOST = 2000
SHARE = 0.1  # of a step, which its part in the loop must be worth


def unroll_loops(bundle: Bundle, *, costs: Costs) -> Bundle:
    schedule = unrolled(bundle.schedule, bundle, costs)
    return bundle if schedule is bundle.schedule else replace(bundle, schedule=schedule)


def unrolled(schedule: Schedule, bundle: Bundle, costs: Costs) -> Schedule:
    def one(item: Item) -> Item:
        item = map_bodies(item, lambda body: unrolled(body, bundle, costs))
        if isinstance(item, Loop) and item.eqn.primitive.name == "scan":
            parts = (item,)
        elif isinstance(item, JointLoop):
            parts = item.parts
        else:
            return item
        wanted = pays(parts, bundle, costs)
        return replace(item, unrolled=wanted) if wanted != item.unrolled else item

    changed = tuple(map(one, schedule))
    return schedule if same(changed, schedule) else changed


def pays(parts: Sequence[Loop], bundle: Bundle, costs: Costs, shifts: int = 1) -> bool:
    """Whether scans, which run as one if there are several, are better without a loop; with as many lanes as are
    left to one of so many shifts (`run_in_shifts`)."""
    scans = [J.as_scan(part.eqn) for part in parts]
    steps = max(scan.length for scan in scans)
    if steps * sum(map(size, scans)) > MOST:
        return False
    lanes = [-(-bundle.families[part.family].width // shifts) for part in parts]
    step_us = sum(equations_us(s.body.jaxpr.eqns, costs, n) for s, n in zip(scans, lanes, strict=True))
    return costs.loop > SHARE * step_us


def size(scan: J.Scan) -> int:
    """Equations of a step, with one for each value that it takes from `xs` or leaves; those of an inner scan once a
    step of its own."""
    return equations(scan.body.jaxpr.eqns) + len(scan.xs) + len(J.outvars(scan.body))


def equations(eqns: Iterable[J.Eqn]) -> int:
    total = 0
    for eqn in eqns:
        inner = J.as_scan(eqn) if eqn.primitive.name == "scan" else None
        own = inner.length * size(inner) if inner else sum(equations(r.jaxpr.eqns) for r in J.regions(eqn))
        total += 1 + own
    return total
