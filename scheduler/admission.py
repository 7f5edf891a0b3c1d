"""Whether a request is taken on: decided at submit, and for good.

It is refused where it could not be done in time beside everything that was promised, where what was promised could not
be done beside it, and where its tenant has its share already and others may need the rest. What its own run will take
is the run of all that wait with it; what it takes from others is one lane of an efficient run.
"""

from __future__ import annotations

from coalesce.scheduler.commands import Reason
from coalesce.scheduler.demand import bucket_of
from coalesce.scheduler.queues import Lane, Level, Queue
from coalesce.scheduler.request import Request
from coalesce.scheduler.shares import Account, Shares


def admit(
    request: Request, account: Account, queue: Queue, level: Level, shares: Shares, free_ns: int, now_ns: int
) -> Lane | Reason:
    """A lane, to be put into the queue; `free_ns` is when the device can begin with it."""
    left_ns = request.deadline_ns - now_ns
    if left_ns <= 0:
        return Reason.EXPIRED
    if account.waiting >= account.tenant.quota:
        return Reason.QUEUE_FULL
    costs = queue.costs
    over = shares.is_over(account, now_ns)
    bucket = bucket_of(request.deadline_ns, now_ns)
    if costs.options:  # else it waits for one that the driver makes
        items = queue.items
        leads = not items or request.deadline_ns < items[0][0]
        others_ns = costs.lane_ns + (costs.first_ns if leads else 0)
        kept_ns = left_ns >> 2 if over else 0
        company = len(items) + 1 + left_ns // queue.gap_ns // 2
        own_ns = costs.through(company)
        blocked_ns = own_ns * (len(level.order) - bool(items)) // 2
        if not level.demand.fits(bucket, own_ns + kept_ns, blocked_ns, others_ns + kept_ns, free_ns):
            return Reason.INFEASIBLE
        shares.charge(account, others_ns)
    account.waiting += 1
    account.pending += 1
    return Lane(request, account, level, bucket)
