"""Who else will come, if requests come as they did: how wide a run may be hoped to be, and what others will need."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot

from coalesce.scheduler.costs import MARKEDLY
from coalesce.scheduler.cover import Cover, FAR, Option
from coalesce.scheduler.lanes import Queue

MORE = 1.25  # times of what is expected: by chance it may be more
OTHERS = 2  # the same, of those who are owed something


# How requests of a queue come: so many per ns, and lanes that a run is hoped to have at most.
Pace = tuple[float, int]


def pace_of(queue: Queue, kinds: int) -> Pace:
    """`kinds` is how many queues there are that runs of other lanes come from."""
    per_ns = queue.rate.per_ns
    return per_ns, most_lanes(queue, per_ns) if kinds == 1 else FAR


def hoped(
    cover: Cover,
    option: Option,
    waiting: int,
    until_ns: int,
    taken: int,
    pace: Pace,
    left_ns: int = FAR,
    slip_ns: float = 0.0,
    risk: float = 0.0,
) -> tuple[Option, int]:
    """A run, or a wider one that does more lanes a second if all come until then that are expected; of these, `taken`
    have a place already. With them that have one then.

    Where its head was promised to be in time, which is due in `left_ns`, it is no longer than that with `risk` of what
    may go wrong; it may begin later by `slip_ns`.
    """
    per_ns, most = pace
    coming = int(until_ns * per_ns * MORE) - taken
    lanes = waiting
    if coming > 0:
        lanes = waiting + coming if waiting + coming < most else most
        lanes = lanes if lanes > waiting else waiting
    width = best_width = option.width
    best, ascends = option, cover.ascends
    if not ascends or lanes > width:
        best_ns = option.mostly_ns / (width if width < lanes else lanes)
        for wider in cover.wider(width):
            wide, _, _, _, _, mostly_ns, wider_slip_ns = wider
            lane_ns = mostly_ns / (wide if wide < lanes else lanes)
            if lane_ns <= best_ns and mostly_ns + risk * hypot(wider_slip_ns, slip_ns) <= left_ns:
                best, best_ns, best_width = wider, lane_ns, wide
            if lane_ns >= best_ns and wide >= lanes and ascends:  # so do the others, of the same lanes
                break
    placed = (best_width if best_width < lanes else lanes) - waiting
    return best, taken + placed if placed > 0 else taken


def most_lanes(queue: Queue, per_ns: float) -> int:
    """The width in which most is served, if runs of one queue follow one another.

    Whoever comes while a run is on the device can be in the next one if both are over in time: all of them, if a run
    takes less than half of the SLO, and else those that come when no more of the SLO is gone than a run leaves. Where
    most come from tenants that are over their shares such a run has to serve markedly more: who is refused for when it
    comes is refused whatever its share.
    """
    slo_ns, uneven = queue.costs.slo_ns, 2 * queue.others.per_ns < per_ns
    found, best = 1, 0.0
    for width, _, _, _, run_ns, _, _ in queue.costs.options:
        come = (run_ns if run_ns < slo_ns - run_ns else slo_ns - run_ns) * per_ns
        served = (width if width <= come else come) / run_ns
        if uneven and 2 * run_ns > slo_ns:
            served -= served / MARKEDLY
        if served >= best:
            found, best = width, served
    return found


# A run in an outlook: lanes that waited for it and for those after it, in what, and from when on.
Laid = tuple[int, Option, int]


def have_room(queue: Queue, runs: Sequence[Laid], done_ns: float, now_ns: int) -> bool:
    """Whether runs of a queue have places for all who are owed something and come before one more run could be begun
    for them: at `done_ns`, and then still in time."""
    (waiting, _, _), (_, last, start_ns) = runs[0], runs[-1]
    room = sum(option.width for _, option, _ in runs) - waiting
    again_ns = done_ns + last.through_ns - queue.costs.slo_ns
    return room >= (min(start_ns, again_ns) - now_ns) * queue.others.per_ns * OTHERS


def has_time(queue: Queue, done_ns: float, now_ns: int, kinds: int) -> bool:
    """Whether whoever comes to it now could have a run at `done_ns`, as wide as may be hoped."""
    costs = queue.costs
    if not costs.options:
        return True
    pace = pace_of(queue, kinds)
    option, _ = hoped(costs.cover, costs.cover.first(1), 1, int(done_ns) - now_ns, 0, pace)
    return done_ns + option.through_ns <= now_ns + costs.slo_ns
