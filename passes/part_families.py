"""Take families apart that `align` packs together, where they run sooner side by side.

Before                                              After
    aligned: family 0 at 0 with family 1 at 0, padded   nothing
    aligned: family 0 at 3 with family 1 at 4, padded

A pack across families saves launches and fills a device that one family leaves idle. It also makes each of them wait
for the others at every pack; side by side they fill the device without that (`passes/side_by_side.py`). ResNets of 18
and 50 layers took 653 us a round in turns on an H200, 685 packed and side by side, and 486 side by side alone. Eight
small MLPs are better packed: there most of a round is launches. All packs of families that share any stay or go, since
those that stay would hold them in step: what is captured (coalesce/capture) runs in turns then, since only what shares
nothing is a branch of its graph. And all stay where the program would run in turns all the same, because of what
other families take, or of a loop that is one on the device: it is part of no graph. Relies on: kernels take about as
long as `align` predicts. Gives: `bundle.aligned` with less in it, and the reason in the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coalesce.bundle import Aligned, Bundle, Place, Schedule
from coalesce.costs import Costs
from coalesce.costs.schedule import Stretch, stretches
from coalesce.family import Family
from coalesce.passes.components import connected, Families, families_of
from coalesce.passes.pack import pack
from coalesce.passes.side_by_side import in_one_graph, launch_us, Rounds
from coalesce.passes.unroll_loops import unroll_loops


def part_families(
    bundle: Bundle, *, platform: str, costs: Costs, wanted: bool | None = None, captured: bool = False
) -> Bundle:
    """`wanted` as `side_by_side` has it."""
    if wanted is False or platform != "gpu" or not bundle.aligned:
        return bundle
    home = connected([tuple(sorted({f for f, _ in group.places})) for group in bundle.aligned])
    schedule = unroll_loops(bundle, costs=costs).schedule
    found = bundle
    for families in dict.fromkeys(home.values()):
        own = tuple(item for item in schedule if families_of([item])[0] in families)
        found = parted(found, families, own, costs, captured)
    return found if found is bundle or wanted or runs_beside(found, costs) else bundle


def runs_beside(bundle: Bundle, costs: Costs) -> bool:
    """Whether all of it is predicted to run sooner side by side, as `side_by_side` will ask of what comes of it."""
    schedule = unroll_loops(pack(bundle), costs=costs).schedule
    found = stretches(schedule, bundle.families, costs)
    if not all(stretch.graph for stretch in found):
        return False
    together, turns = ways(schedule, found, bundle.families, costs)
    return together.both < (1 - costs.margin) * turns.both


def parted(bundle: Bundle, families: Families, own: Schedule, costs: Costs, captured: bool) -> Bundle:
    """With or without what those families share; `own` is all that they run."""
    found = stretches(own, bundle.families, costs)
    if not all(stretch.graph for stretch in found):
        return bundle  # what is in no graph runs in turns
    apart, turns = ways(own, found, bundle.families, costs)
    groups = [group for group in bundle.aligned if group.places[0][0] in families]
    packed = pack(replace(bundle, schedule=own, aligned=tuple(groups))).schedule
    found = stretches(packed, bundle.families, costs)
    beside, in_turns = ways(packed, found, bundle.families, costs)
    kept = in_turns if captured else min(beside, in_turns, key=lambda way: way.both)
    if apart.both >= (1 - costs.margin) * turns.both or kept.both <= apart.both:
        return bundle
    why = (
        f"its families are predicted to take {apart.alone:.0f} us a round side by side and {kept.alone:.0f} with what "
        f"they could share, of many in a row {apart.in_row:.0f} and {kept.in_row:.0f}"
    )
    return without(bundle, groups, why, costs)


def ways(
    schedule: Schedule, found: Sequence[Stretch], families: Sequence[Family], costs: Costs
) -> tuple[Rounds, Rounds]:
    """Side by side as far as nothing is shared, and in turns; `found` are its stretches."""
    host_us, us = costs.device.dispatch_us + launch_us(found), sum(own.us for own in found)
    return in_one_graph(schedule, found, families, costs), Rounds(host_us + us, max(host_us, us))


def without(bundle: Bundle, groups: Sequence[Aligned], why: str, costs: Costs) -> Bundle:
    records, lost_us = dict(bundle.records), 0.0
    for group in groups:
        lost_us += gain_us(bundle, group, costs)
        for place in group.places:
            others = " and ".join(f"family {f} at {site}" for f, site in group.places if (f, site) != place)
            old = records[place]
            records[place] = replace(old, reason=f"could run with {others}, but {why}", company=(), shape="")
    gone = set(groups)
    aligned = tuple(group for group in bundle.aligned if group not in gone)
    left_us = bundle.predicted_us - lost_us if aligned else 0.0
    return replace(bundle, aligned=aligned, records=records, predicted_us=left_us)


def gain_us(bundle: Bundle, group: Aligned, costs: Costs) -> float:
    """What one pack was predicted to win: its stacked result saves a kernel for each part that it has more."""
    place: Place = group.places[0]
    tails = costs.launch * (len(group.places) - 1) if group.stacked else 0.0
    return bundle.records[place].gain_us + tails
