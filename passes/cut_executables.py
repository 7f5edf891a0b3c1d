"""Cut a fused program into executables, each of which is launched while those before it run.

Before                                      After, with executables=2
    pack 0 x2 dot ... [family 0 at 0 x2]      executable 0
      f0: %3:f32[2,8] = dot_general %2 %0       pack 0 x2 dot ... [family 0 at 0 x2]
    f0: %4:f32[2,8] = tanh %3                     f0: %3:f32[2,8] = dot_general %2 %0
    pack 1 x2 dot ... [family 0 at 2 x2]        f0: %4:f32[2,8] = tanh %3
      f0: %5:f32[2,8] = dot_general %4 %1     executable 1
                                                pack 1 x2 dot ... [family 0 at 2 x2]
                                                  f0: %5:f32[2,8] = dot_general %4 %1

A GPU starts no kernel of a CUDA graph before the host has launched all of it: 97 of the 1,040 us that a round of 16
ResNet-50 takes on an H100. Cuts lie before packs and loops, where what XLA fuses to one kernel ends anyway, and where
little is live: nothing between families that share no kernel, so where there are several executables these run one
after the other, in the order that hides most of their launches (`passes/components.py`). How many executables there are
is decided by cost (`passes/launch_cuts.py`); families that run side by side are one. Relies on: nothing moves in the
schedule after this. Gives: what is read behind a cut was computed before it, once, or is an argument, or depends on
weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

from coalesce import jaxpr as J
from coalesce.bundle import Bundle, equations, Schedule
from coalesce.costs import Costs
from coalesce.costs.schedule import Stretch, stretches
from coalesce.passes.components import best_order, Component, components, Job
from coalesce.passes.cuts import Point
from coalesce.passes.first_reads import first_reads
from coalesce.passes.launch_cuts import choose_parts, listed, SURE
from coalesce.passes.live import lifetimes, live_before
from coalesce.passes.segment import kept_apart
from coalesce.passes.share_launches import numbered
from coalesce.reschedule import same


def cut_executables(bundle: Bundle, *, platform: str, costs: Costs, executables: int | None = None) -> Bundle:
    """`executables` is how many there are to be, if there are places for so many. None: as many as win, on a GPU."""
    if executables is None and platform == "cpu":
        why = "one executable: kernels run as they are launched"
        return bundle if bundle.why_starts == why else replace(bundle, starts=(0,), why_starts=why)
    apart = in_order(bundle, costs)
    schedule = tuple(item for own in apart for item in own.component.schedule)
    found = [stretch for own in placed(apart) for stretch in own]
    wanted = 1 if bundle.beside else executables
    chosen = choose_parts(found, places(bundle, schedule, [own.start for own in found]), costs, wanted)
    starts, why = (0, *(found[cut].start for cut in chosen.cuts)), chosen.why
    if bundle.beside or executables is not None:
        why = f"{'side by side' if bundle.beside else 'as asked for'}: {why}"
    if len(starts) == 1 or same(schedule, bundle.schedule):
        schedule = bundle.schedule
    else:
        schedule = numbered(schedule)
    if len(starts) > 1 and len(apart) > 1:
        why = f"{why}. Without a kernel in common, one after the other: {'; '.join(map(text, apart))}"
    if schedule is bundle.schedule and (starts, why) == (bundle.starts, bundle.why_starts):
        return bundle
    return replace(bundle, schedule=schedule, starts=starts, why_starts=why)


class Timed(NamedTuple):
    component: Component
    stretches: list[Stretch]  # `start` counts from the component's first item

    def job(self, costs: Costs) -> Job:
        """As an executable of its own."""
        device = costs.device
        launch_us = sum(own.launch_us + device.argument_us * own.reads for own in self.stretches)
        return Job(device.dispatch_us + launch_us, SURE * sum(own.us for own in self.stretches))


def in_order(bundle: Bundle, costs: Costs) -> list[Timed]:
    found: list[Timed] = []
    for own in components(bundle.schedule):
        parts = stretches(own.schedule, bundle.families, costs)
        reads = first_reads(bundle, own.schedule, [part.start for part in parts])
        found.append(Timed(own, [part._replace(reads=n) for part, n in zip(parts, reads, strict=True)]))
    return [found[i] for i in best_order([own.job(costs) for own in found])]


def placed(apart: Sequence[Timed]) -> list[list[Stretch]]:
    """The stretches of components that follow one another; `start` counts from the first item of all."""
    sizes = [len(own.component.schedule) for own in apart]
    return [
        [stretch._replace(start=before + stretch.start) for stretch in own.stretches]
        for own, before in zip(apart, [0, *accumulate(sizes)], strict=False)
    ]


def text(own: Timed) -> str:
    families = own.component.families
    launch_us, run_us = (sum(getattr(s, name) for s in own.stretches) for name in ("launch_us", "us"))
    which = f"family {families[0]}" if len(families) == 1 else f"families {listed(map(str, families))}"
    return f"{which} ({launch_us:.0f} us to launch, {run_us:.0f} to run)"


def places(bundle: Bundle, schedule: Schedule, starts: Sequence[int]) -> list[Point]:
    """The stretches, by number, before which no key is live, with the bytes of all lanes that are."""
    bounds = [*starts, len(schedule)]
    inside = [
        [eqn for item in schedule[a:b] for eqn in equations(item)] for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    families = enumerate(bundle.families)
    left_out = {(f, v) for f, family in families for v in of_weights(family.jaxpr, family.n_weights)}
    reads = [[(f, a) for f, eqn in own for a in eqn.invars if not isinstance(a, J.Literal)] for own in inside]
    binds = [[(f, v) for f, eqn in own for v in eqn.outvars if (f, v) not in left_out] for own in inside]
    live = live_before(lifetimes((), reads, binds), len(inside))
    return [
        Point(at, sum(bundle.families[f].width * J.nbytes(v.aval) for f, v in values))
        for at, values in enumerate(live)
        if at and not any(J.is_key(v.aval) for _, v in values)
    ]


def of_weights(jaxpr: Any, n_weights: int) -> list[Any]:
    """What depends on weights and literals alone: whoever reads it computes it."""
    return [v for eqn in kept_apart(jaxpr, n_weights)[1] for v in eqn.outvars]
