"""Whether a request is taken on: decided at submit, and for good.

It is refused where it could not be done in time beside everything that was promised, where what was promised could not
be done beside it, where it would make runs narrow that are better wide (`outlook`), and where its tenant has had its
share already, or MUCH of it while no more is asked of the device than it can do, and others need the place. Of its time
a part is kept back where promises were not kept lately (`promises`). Before an idle device where nobody waits there are
no others: whoever is in time as runs mostly go is taken on.

As long as few queues wait, the runs that are to come are laid to see that. Beyond that the demand test answers, with
what its own run will take: that of the company that it can expect, what waits with it, and what will come. So it does
where something that was promised will be late, after a hiccup of the host say, though less is asked of the device than
it can do: runs that are laid for heads that are nearly late are narrow, and rule out whoever came meanwhile. Whoever is
taken on has the time for such a run. A request that has not is still taken on if it can run with those that are due
before it, and there is some time to spare: a little as long as less is asked for than the device can do, else so much
that nobody needs efficient runs.

Where no tenant has an SLO of more than BRIEF_NS, nor is suspected of making runs slow, whoever could be in time next is
taken on, and dropped when it turns out that it cannot: an answer that soon is one at once. Plans are off by as much as
such an SLO, and take as long to make as some runs.
"""

from __future__ import annotations

from bisect import bisect_left

from coalesce.scheduler.commands import Reason
from coalesce.scheduler.demand import bucket_of
from coalesce.scheduler.lanes import Level, Queue
from coalesce.scheduler.laying import Newcomer, Start
from coalesce.scheduler.load import Load
from coalesce.scheduler.outlook import (
    close,
    has_room,
    hoped_with,
    is_closed,
    is_few,
    keeps_room,
    known,
    known_hoped,
    outlook,
    outlook_with,
    remember,
    remembered,
)
from coalesce.scheduler.promises import Promises
from coalesce.scheduler.quarantine import Watch
from coalesce.scheduler.request import Request
from coalesce.scheduler.shares import Account, CLOSE, Shares
from coalesce.scheduler.tenancy import BRIEF_NS, Tenancy
from coalesce.scheduler.tuples import made

INFEASIBLE = Reason.INFEASIBLE
MUCH = 1.5  # times its share: more than one has whose lanes cost more than others'
FAR_OFF = 2  # times the least SLO of its family: who is due so late can wait for others


class Admission:
    def __init__(self, tenancy: Tenancy, watch: Watch, shares: Shares, load: Load, promises: Promises) -> None:
        self.foreseen = False  # whether the outlook has who was taken on last
        self._tenancy, self._watch = tenancy, watch
        self._shares, self._load, self._promises = shares, load, promises

    def admit(
        self, request: Request, account: Account, queue: Queue, excess: float, start: Start, now_ns: int
    ) -> Reason | None:
        """Why it is refused; `start` is when the device can begin with it, `excess` what its tenant has had."""
        self.foreseen = False
        number, _, _, _, due_ns, _ = request
        costs, shares = queue.costs, self._shares
        if due_ns <= now_ns:
            return Reason.EXPIRED
        if account.waiting >= account.quota:
            return Reason.QUEUE_FULL
        if not costs.options:  # it waits for one that the driver makes
            return None
        items, level, work_ns = queue.items, queue.level, costs.lane_ns
        self._load.ask(work_ns, now_ns)
        over, careful = excess > (MUCH if start.is_calm else CLOSE), False
        if over:
            careful = shares.is_careful(account, excess, work_ns)
        if excess <= CLOSE:
            queue.others.note(now_ns, costs.slo_ns)
        is_last = not items or items[-1][0] < due_ns or items[-1] < (due_ns, number)
        if not items or (not is_last and due_ns < items[0][0]):
            work_ns += costs.first_ns
        kept_ns, by_ns = 0, due_ns
        if self._promises.share:
            self._promises.note_load(self._load.is_over(now_ns), now_ns)
            kept_ns = int(self._promises.kept(due_ns, now_ns) * (due_ns - now_ns))
            by_ns -= kept_ns
        is_brief = self._tenancy.is_brief and due_ns - now_ns <= BRIEF_NS
        if is_brief and level.ladder.top is level and not (over or self._watch.standings):
            fits = start.free_ns + costs.alone.l50_ns <= by_ns
        elif level.spare > 0 or is_few(level):
            if is_last and items and not over and has_room(queue, by_ns, start, now_ns):
                fits = self.foreseen = True
            elif start.is_calm and costs.runs == 1 and is_broken(level, start, now_ns):
                fits = fits_demand(request, queue, kept_ns, work_ns + kept_ns, self._load, start.free_ns, now_ns)
            else:
                fits = self._fits_outlook(request, queue, start, is_last, over, careful, kept_ns, now_ns)
        else:
            if over:
                kept_ns += kept(due_ns - now_ns, queue, careful)
            fits = fits_demand(request, queue, kept_ns, work_ns + kept_ns, self._load, start.free_ns, now_ns)
        if fits:
            shares.charge(account, work_ns, over)
            return None
        if excess <= CLOSE:
            shares.note_refusal()
        return INFEASIBLE

    def _fits_outlook(
        self,
        request: Request,
        queue: Queue,
        start: Start,
        is_last: bool,
        over: bool,
        careful: bool,
        kept_ns: int,
        now_ns: int,
    ) -> bool:
        """Of one that is not known to come to a run that is there anyway."""
        level, items, due_ns = queue.level, queue.items, request.deadline_ns
        if start.is_idle and not queue.lot and level.is_idle():
            return start.free_ns + queue.costs.alone.l50_ns <= due_ns
        if over and queue.lot:
            kept_ns += kept(due_ns - now_ns, queue, False)
        is_asked = over or not items  # else `admit` has
        if is_asked and is_last and not careful and has_room(queue, due_ns - kept_ns, start, now_ns):
            self.foreseen = True
            return True
        at = len(items) if is_last else bisect_left(items, (due_ns, request.id))
        new = made(Newcomer, (queue, due_ns - kept_ns, at, not careful))
        is_far = due_ns - now_ns >= FAR_OFF * queue.costs.slo_ns
        if is_far and is_last and not careful and not queue.lot and can_wait(new, start, now_ns):
            return True
        if spare_ns := int(start.spare_ns(queue.costs.slo_ns)):  # it is kept for it as for everybody
            kept_ns = max(0, kept_ns - spare_ns)
            new = made(Newcomer, (queue, due_ns - kept_ns, at, not careful))
        found = remembered(level, start)
        if found.closed and is_closed(found, new):
            return False
        after = outlook_with(found, level, start, now_ns, new)
        if not after.is_good(queue) and not known(level, start, now_ns).bears(queue, after):
            return close(found, new, after.tardy_ns - known(level, start, now_ns).tardy_ns)
        hoped = None if careful or self._load.is_over(now_ns) else hoped_with(found, new)
        if hoped is None:
            hoped = outlook(level, start, now_ns, new, hope=True)
            if not hoped.is_good(queue) and not known_hoped(level, start, now_ns).bears(queue, hoped):
                return close(found, new, hoped.tardy_ns - known_hoped(level, start, now_ns).tardy_ns)
        if careful and not keeps_room(hoped, level, now_ns):
            return False
        if not kept_ns:
            remember(found, after, hoped)
            self.foreseen = True
        return True


def is_broken(level: Level, start: Start, now_ns: int) -> bool:
    """Whether something that was promised will be late, as far as anybody knows."""
    return not level.is_idle() and known(level, start, now_ns).tardy_ns > 0


def can_wait(new: Newcomer, start: Start, now_ns: int) -> bool:
    """Whether one that is due long after the others of its queue can run when all that was promised is done, whatever
    becomes of that, and delays nobody. Those of its own queue who are due sooner may go in narrower runs."""
    queue, level = new.queue, new.queue.level
    sure = known(level, start, now_ns)
    if sure.end_ns + sure.slip_ns + queue.costs.options[queue.costs.steady].through_ns > new.due_ns:
        return False
    if level.order and level.order[0][2] is queue and len(level.order) == 1:
        return True
    after = outlook_with(remembered(level, start), level, start, now_ns, new)
    return after.tardy_ns <= sure.tardy_ns and after.late <= sure.late


def kept(left_ns: int, queue: Queue, scarce: bool) -> int:
    """Of the time up to the deadline of one that is over its share, what others may need."""
    if queue.lot:
        return 3 * left_ns >> 2
    return left_ns >> 2 if scarce else 0


def fits_demand(
    request: Request, queue: Queue, kept_ns: int, work_ns: int, load: Load, free_ns: int, now_ns: int
) -> bool:
    costs, demand, items, bucket = queue.costs, queue.level.demand, queue.items, bucket_of(request.deadline_ns, now_ns)
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
    spare_ns = steady_ns * (1 + others) if load.is_over(now_ns) else steady_ns >> 3
    widest = costs.widths[-1]
    counted_ns = min(ahead, widest - 1) * costs.lane_ns  # of its own run, in what is due before it
    if 0 < ahead < widest:
        counted_ns += queue.head_ns
    left_ns += request.deadline_ns - bucket
    in_time = own_ns - counted_ns + before_ns + min(own_ns * others // 2, before_ns) <= left_ns
    return in_time and latest_ns - work_ns - spare_ns >= free_ns
