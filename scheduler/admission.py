"""Whether a request is taken on: decided at submit, and for good.

It is refused where it could not be done in time beside everything that was promised, where what was promised could not
be done beside it, where it would make runs narrow that are better wide (`outlook`), and where its tenant has its share
already and others need the place.

As long as few queues wait, the runs that are to come are laid to see that. Beyond that the demand test answers, with
what its own run will take: that of the company that it can expect, what waits with it, and what will come. Whoever is
taken on has the time for such a run. A request that has not is still taken on if it can run with those that are due
before it, and there is some time to spare: a little as long as less is asked for than the device can do, else so much
that nobody needs efficient runs.
"""

from __future__ import annotations

from bisect import bisect_left

from coalesce.scheduler.commands import Reason
from coalesce.scheduler.demand import bucket_of
from coalesce.scheduler.load import Load
from coalesce.scheduler.outlook import close, is_closed, is_few, known, known_hoped, Newcomer, outlook, remember, Start
from coalesce.scheduler.queues import Lane, Queue
from coalesce.scheduler.request import Request
from coalesce.scheduler.shares import Account, CLOSE, Shares


def admit(
    request: Request,
    account: Account,
    queue: Queue,
    shares: Shares,
    load: Load,
    start: Start,
    excess: float,
    now_ns: int,
) -> Lane | Reason:
    """A lane, to be put into the queue; `start` is when the device can begin with it."""
    left_ns = request.deadline_ns - now_ns
    if left_ns <= 0:
        return Reason.EXPIRED
    if account.waiting >= account.tenant.quota:
        return Reason.QUEUE_FULL
    lane = Lane(request, account, queue.level, bucket_of(request.deadline_ns, now_ns))
    costs = queue.costs
    if costs.options:  # else it waits for one that the driver makes
        load.ask(costs.lane_ns, now_ns)
        over = excess > CLOSE
        careful = over and shares.is_careful(account, excess, costs.lane_ns)
        if not over:
            queue.others.note(now_ns, costs.slo_ns)
        work_ns = costs.lane_ns + (costs.first_ns if queue.leads(request) else 0)
        if is_few(queue.level):
            fits = fits_outlook(lane, queue, start, over, careful, now_ns)
        else:
            kept_ns = kept(left_ns, queue, careful) if over else 0
            crowded = load.is_over(now_ns)
            fits = fits_demand(request, lane.bucket, queue, kept_ns, work_ns + kept_ns, crowded, start.free_ns)
        if not over:
            shares.note(missed=not fits)
        if not fits:
            return Reason.INFEASIBLE
        shares.charge(account, work_ns)
    account.waiting += 1
    account.pending += 1
    return lane


def fits_outlook(lane: Lane, queue: Queue, start: Start, over: bool, careful: bool, now_ns: int) -> bool:
    request, level = lane.request, queue.level
    kept_ns = kept(request.deadline_ns - now_ns, queue, False) if over else 0
    at = bisect_left(queue.items, (request.deadline_ns, request.id))
    new = Newcomer(queue, request.deadline_ns - kept_ns, at)
    if not careful and known(level, start, now_ns).has_room(new):
        lane.foreseen = True
        return True
    if is_closed(level, start, new):
        return False
    after = outlook(level, start, now_ns, new)
    if not after.is_good(queue) and not known(level, start, now_ns).bears(queue, after):
        return close(level, start, new, after.tardy_ns - known(level, start, now_ns).tardy_ns)
    hoped = outlook(level, start, now_ns, new, hope=True)
    if not hoped.is_good(queue) and not known_hoped(level, start, now_ns).bears(queue, hoped):
        return close(level, start, new, hoped.tardy_ns - known_hoped(level, start, now_ns).tardy_ns)
    if careful and not hoped.keeps_room(level, now_ns):
        return False
    if not kept_ns:
        remember(level, start, after, hoped)
        lane.foreseen = True
    return True


def kept(left_ns: int, queue: Queue, scarce: bool) -> int:
    """Of the time up to the deadline of one that is over its share, what others may need."""
    if queue.lot:
        return 3 * left_ns >> 2
    return left_ns >> 2 if scarce else 0


def fits_demand(
    request: Request, bucket: int, queue: Queue, kept_ns: int, work_ns: int, crowded: bool, free_ns: int
) -> bool:
    costs, demand, items = queue.costs, queue.level.demand, queue.items
    others = queue.level.starting - bool(items)  # that run before its own, with half of their lanes due after it
    lanes, come_ns, left_ns = len(items) + 1, free_ns - request.arrival_ns, bucket - free_ns - kept_ns
    while True:
        before_ns, latest_ns = demand.around(bucket)
        own_ns = costs.filled(lanes + (come_ns + before_ns) // queue.gap_ns)
        if latest_ns - work_ns >= free_ns and own_ns + before_ns + min(own_ns * others // 2, before_ns) <= left_ns:
            return True
        if not demand.sum_up():
            break
    ahead = bisect_left(items, (request.deadline_ns,))
    own_ns = costs.through(ahead + 1)
    steady_ns = costs.options[costs.steady].through_ns
    spare_ns = steady_ns * (1 + others) if crowded else steady_ns >> 3
    widest = costs.widths[-1]
    counted_ns = min(ahead, widest - 1) * costs.lane_ns  # of its own run, in what is due before it
    if 0 < ahead < widest:
        counted_ns += queue.head_ns
    left_ns += request.deadline_ns - bucket
    in_time = own_ns - counted_ns + before_ns + min(own_ns * others // 2, before_ns) <= left_ns
    return in_time and latest_ns - work_ns - spare_ns >= free_ns
