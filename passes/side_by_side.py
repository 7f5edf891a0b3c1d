"""Decide whether families run side by side: one executable, in whose CUDA graph they are branches.

Before                                          After, where that is predicted to win
    pack 0 x2 dot ... [family 0 at 0 x2]            ...
      f0: %3:f32[2,8] = dot_general %2 %0         -> family 0: %3
    pack 1 x2 dot ... [family 1 at 0 x2]          -> family 1: %3
      f1: %3:f32[4,9] = dot_general %2 %0         independent kernels run side by side
  -> family 0: %3
  -> family 1: %3

A small kernel leaves most of a device idle, and families wait for each other only at what they share. If XLA is told so
(`options_of`) the edges of its graphs are from whoever writes a buffer to whoever uses it, and no two families get one
buffer for what they compute on the way: such an executable needs the sum of what they need, and not the most. The
schedule stays, since XLA makes its own. A round is weighed (`coalesce/costs/beside.py`) against one in turns, in as
many executables as win: one that is waited for and one of many. Relies on: nothing changes the packs after this.
Gives: a bundle `beside` is one executable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from coalesce.bundle import Bundle, Schedule
from coalesce.costs import Costs
from coalesce.costs.beside import beside
from coalesce.costs.schedule import Stretch, stretches
from coalesce.family import Family
from coalesce.passes.cut_executables import in_order, placed, places
from coalesce.passes.launch_cuts import choose_parts, SURE

# XLA: kernels of a CUDA graph wait for those that use their buffers, and for no other.
CONCURRENT: Mapping[str, Any] = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}


class Rounds(NamedTuple):
    """Microseconds of a round: one that is waited for, and one of many in a row."""

    alone: float
    in_row: float

    @property
    def both(self) -> float:
        return self.alone + self.in_row


def options_of(bundle: Bundle, given: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """What XLA compiles a bundle with: what was given by the caller goes first."""
    return {**(CONCURRENT if bundle.beside else {}), **(given or {})} or None


def side_by_side(bundle: Bundle, *, platform: str, costs: Costs, wanted: bool | None = None) -> Bundle:
    """`wanted` says whether they are to; None: where it is predicted to win. On a GPU alone: a CPU's kernels run as
    they are launched."""
    chosen = (False, "") if platform != "gpu" else decided(bundle, costs, wanted)
    if chosen == (bundle.beside, bundle.why_beside):
        return bundle
    return replace(bundle, beside=chosen[0], why_beside=chosen[1])


def decided(bundle: Bundle, costs: Costs, wanted: bool | None) -> tuple[bool, str]:
    if wanted is not None:
        return wanted, f"side by side: {'' if wanted else 'not '}asked for"
    if len(bundle.families) < 2:
        return False, ""
    own = stretches(bundle.schedule, bundle.families, costs)
    if not all(stretch.graph for stretch in own):
        return False, "one after the other: some of it, such as a loop, is part of no CUDA graph"
    together, turns = in_one_graph(bundle.schedule, own, bundle.families, costs), in_turns(bundle, costs)
    won = together.both < (1 - costs.margin) * turns.both
    how = "side by side" if won else "one after the other"
    return won, (
        f"{how}: a round is predicted to take {together.alone:.0f} us side by side and {turns.alone:.0f} in turns, of "
        f"many in a row {together.in_row:.0f} and {turns.in_row:.0f}"
    )


def in_one_graph(schedule: Schedule, found: Sequence[Stretch], families: Sequence[Family], costs: Costs) -> Rounds:
    """Side by side; `found` are its stretches. Arguments are left out, which either way has."""
    host_us = costs.device.dispatch_us + launch_us(found)
    us = beside(schedule, families, costs).us
    return Rounds(host_us + us, max(host_us, us))


def in_turns(bundle: Bundle, costs: Costs) -> Rounds:
    """In as many executables as win, without their arguments."""
    apart = in_order(bundle, costs)
    found = [stretch._replace(reads=0) for own in placed(apart) for stretch in own]
    schedule = tuple(item for own in apart for item in own.component.schedule)
    chosen = choose_parts(found, places(bundle, schedule, [own.start for own in found]), costs)
    calls, us = len(chosen.cuts) + 1, sum(own.us for own in found)
    host_us = calls * costs.device.dispatch_us + launch_us(found)
    return Rounds(chosen.us + (1 - SURE) * us, max(host_us, us))


def launch_us(found: Sequence[Stretch]) -> float:
    return sum(own.launch_us for own in found)
