"""Take families apart that `align` packs together, where they run sooner side by side.

Before                                              After
    aligned: family 0 at 0 with family 1 at 0, padded   nothing
    aligned: family 0 at 3 with family 1 at 4, padded

A pack across families saves launches and fills a device that one family leaves idle. It also makes each of them wait
for the others at every pack; side by side they fill the device without that (`passes/side_by_side.py`). ResNets of 18
and 50 layers took 653 us a round in turns on an H200, 685 packed and side by side, and 486 side by side alone. Eight
small MLPs are better packed: there most of a round is launches. All packs of families that share any stay or go, since
those that stay would hold them in step. Families with a loop that is one on the device keep theirs, since it is part of
no graph. Relies on: kernels take about as long as `align` predicts. Gives: `bundle.aligned` with less in it, and the
reason in the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coalesce.bundle import Aligned, Bundle, Place, Schedule
from coalesce.costs import Costs
from coalesce.costs.schedule import stretches
from coalesce.family import Family
from coalesce.passes.components import connected, Families, families_of
from coalesce.passes.pack import pack
from coalesce.passes.side_by_side import in_one_graph, launch_us, Rounds
from coalesce.passes.unroll_loops import unroll_loops


def part_families(bundle: Bundle, *, platform: str, costs: Costs, wanted: bool | None = None) -> Bundle:
    """`wanted` as `side_by_side` has it."""
    if wanted is False or platform != "gpu" or not bundle.aligned:
        return bundle
    home = connected([tuple(sorted({f for f, _ in group.places})) for group in bundle.aligned])
    schedule = unroll_loops(bundle, costs=costs).schedule
    for families in dict.fromkeys(home.values()):
        own = tuple(item for item in schedule if families_of([item])[0] in families)
        bundle = parted(bundle, families, own, costs)
    return bundle


def parted(bundle: Bundle, families: Families, own: Schedule, costs: Costs) -> Bundle:
    """With or without what those families share; `own` is all that they run."""
    if not all(stretch.graph for stretch in stretches(own, bundle.families, costs)):
        return bundle  # what is in no graph runs in turns
    apart, turns = ways(own, bundle.families, costs)
    groups = [group for group in bundle.aligned if group.places[0][0] in families]
    packed = pack(replace(bundle, schedule=own, aligned=tuple(groups))).schedule
    kept = min(ways(packed, bundle.families, costs), key=lambda way: way.both)
    if apart.both >= (1 - costs.margin) * turns.both or kept.both <= apart.both:
        return bundle
    why = (
        f"its families are predicted to take {apart.alone:.0f} us a round side by side and {kept.alone:.0f} with what "
        f"they could share, of many in a row {apart.in_row:.0f} and {kept.in_row:.0f}"
    )
    return without(bundle, groups, why, costs)


def ways(schedule: Schedule, families: Sequence[Family], costs: Costs) -> tuple[Rounds, Rounds]:
    """Side by side as far as nothing is shared, and in turns."""
    found = stretches(schedule, families, costs)
    host_us, us = costs.device.dispatch_us + launch_us(found), sum(own.us for own in found)
    return in_one_graph(schedule, families, costs), Rounds(host_us + us, max(host_us, us))


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
