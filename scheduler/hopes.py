"""Who else will come, if requests come as they did: how wide a run may be hoped to be, and what others will need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from coalesce.scheduler.cover import Option
from coalesce.scheduler.queues import Queue

MORE = 1.25  # times of what is expected: by chance it may be more
OTHERS = 2  # the same, of those who are owed something


class Hope(NamedTuple):
    option: Option
    lanes: int  # that will have come for it, or for a run before it


def hoped(queue: Queue, option: Option, waiting: int, until_ns: int, taken: int, kinds: int) -> Hope:
    """A run, or a wider one that does more lanes a second if all come until then that are expected.

    Of these, `taken` have a place already. `kinds` is how many queues there are that runs of other lanes come from.
    """
    lanes = waiting + max(0, int(until_ns * queue.rate.per_ns * MORE) - taken)
    if kinds == 1:
        lanes = max(waiting, min(lanes, most_lanes(queue)))
    best, best_ns = option, option.mostly_ns / min(option.width, lanes)
    for wider in queue.costs.cover.options:
        if wider.width > option.width:
            lane_ns = wider.mostly_ns / min(wider.width, lanes)
            if lane_ns <= best_ns:
                best, best_ns = wider, lane_ns
    return Hope(best, taken + max(0, min(best.width, lanes) - waiting))


def most_lanes(queue: Queue) -> int:
    """The width in which most is served, if runs of one queue follow one another.

    Whoever comes while a run is on the device can be in the next one if both are over in time: all of them, if a run
    takes less than half of the SLO, and else those that come when no more of the SLO is gone than a run leaves.
    """
    slo_ns, per_ns = queue.costs.slo_ns, queue.rate.per_ns
    found, best = 1, 0.0
    for option in queue.costs.options:
        run_ns = option.through_ns
        served = min(option.width, min(run_ns, slo_ns - run_ns) * per_ns) / run_ns
        if served >= best:
            found, best = option.width, served
    return found


def have_room(queue: Queue, runs: Sequence[tuple[int, Option, int, bool]], done_ns: float, now_ns: int) -> bool:
    """Whether runs of a queue have places for all who are owed something and come before one more run could be begun
    for them: at `done_ns`, and then still in time."""
    _, option, start_ns, _ = runs[-1]
    room = sum(run[1].width for run in runs) - runs[0][0]
    again_ns = done_ns + option.through_ns - queue.costs.slo_ns
    return room >= (min(start_ns, again_ns) - now_ns) * queue.others.per_ns * OTHERS


def has_time(queue: Queue, done_ns: float, now_ns: int, kinds: int) -> bool:
    """Whether whoever comes to it now could have a run at `done_ns`, as wide as may be hoped."""
    costs = queue.costs
    if not costs.options:
        return True
    option = hoped(queue, costs.cover.first(1), 1, int(done_ns) - now_ns, 0, kinds).option
    return done_ns + option.through_ns <= now_ns + costs.slo_ns
