"""Whether to wait for more lanes while the device is idle.

Waiting pays where more lanes are expected within what is fixed in a run than there are now. It lasts no longer than
that time, counted from the first lane's arrival: so it costs no more than the run that it may save. And it lasts only
as long as the head is still in time in a run twice as wide, as clients see it, and everything that was promised stays
feasible: a host that takes its time leaves less to wait. A run of several lanes that is full goes at once.

How often requests come says little where callers wait for results before they ask again: many may come at once, and
then nobody before the last of them has its own. So a lone lane waits only where company mostly came within such a time,
whether it was waited for or not.
"""

from __future__ import annotations

from coalesce.scheduler.joining import Run

GOOD_ODDS = 0.5


def wait_until(run: Run, host_ns: int) -> int:
    """Until when, at most; a time that has passed for not at all. `host_ns` is what the host adds to a run;
    it wakes up late as well."""
    host_ns += host_ns >> 1
    part = run.parts[0]
    queue = part.queue
    lanes = part.end - part.first
    if len(run.parts) > 1 or part.first or queue.lot or queue.place[1]:
        return 0
    if lanes >= part.width > 1 or lanes >= queue.costs.options[queue.costs.steady].width:
        return 0
    fixed_ns = queue.costs.fixed_ns
    if lanes * queue.gap_ns >= fixed_ns:
        return 0
    deadline_ns, _, lane = queue.items[0]
    until_ns = min(lane.request.arrival_ns + fixed_ns, deadline_ns - queue.costs.through(2 * lanes) - host_ns)
    if lanes == 1:
        queue.hoped_ns = until_ns
        if queue.luck < GOOD_ODDS:
            return 0
    return until_ns if queue.level.demand.is_feasible(until_ns + host_ns) else 0
