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
little is live; how many there are is decided by cost (`passes/launch_cuts.py`). Relies on: nothing moves in the
schedule after this. Gives: what is read behind a cut was computed before it, once, or is an argument, or depends on
weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from coalesce import jaxpr as J
from coalesce.bundle import Bundle, equations
from coalesce.costs import Costs
from coalesce.costs.schedule import stretches
from coalesce.passes.cuts import Point
from coalesce.passes.launch_cuts import choose_parts
from coalesce.passes.live import lifetimes, live_before
from coalesce.passes.segment import kept_apart


def cut_executables(bundle: Bundle, *, platform: str, costs: Costs, executables: int | None = None) -> Bundle:
    """`executables` is how many there are to be, if there are places for so many. None: as many as win, on a GPU."""
    if executables is None and platform == "cpu":
        why = "one executable: kernels run as they are launched"
        return bundle if bundle.why_starts == why else replace(bundle, starts=(0,), why_starts=why)
    found = stretches(bundle.schedule, bundle.families, costs)
    chosen = choose_parts(found, places(bundle, [own.start for own in found]), costs, executables)
    starts = (0, *(found[cut].start for cut in chosen.cuts))
    if (starts, chosen.why) == (bundle.starts, bundle.why_starts):
        return bundle
    return replace(bundle, starts=starts, why_starts=chosen.why)


def places(bundle: Bundle, starts: Sequence[int]) -> list[Point]:
    """The stretches, by number, before which no key is live, with the bytes of all lanes that are."""
    bounds = [*starts, len(bundle.schedule)]
    inside = [
        [eqn for item in bundle.schedule[a:b] for eqn in equations(item)]
        for a, b in zip(bounds, bounds[1:], strict=False)
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
