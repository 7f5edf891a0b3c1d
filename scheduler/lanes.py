"""What waits, where, and in which order.

    Lane      a request on its way through the segments of its family
    Queue     lanes that may share a bundle, by deadline: of one place, one lot and one priority
    Level     the queues of one priority, by the latest start of their heads, and what was promised from it upwards
    Ladder    which levels have something to do with what is decided now, of as many as there are

The lot is 0 for everybody, and another number for those that run apart: tenants in quarantine, and what is left of a
bundle that failed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

from coalesce.scheduler.commands import Reason
from coalesce.scheduler.costs import Place, PlaceCosts
from coalesce.scheduler.demand import Demand, FAR, Work
from coalesce.scheduler.rate import FAIR, Rate
from coalesce.scheduler.request import Request
from coalesce.scheduler.shares import Account
from coalesce.scheduler.slots import Slots

UNKNOWN = -1

Item = tuple[int, int, "Lane"]  # deadline, id: no two are equal, so that lanes are never compared


class Lane:
    __slots__ = ("request", "account", "level", "bucket", "charge_ns", "queue", "ending", "begun", "again")

    def __init__(
        self, request: Request, account: Account, level: Level, bucket: int, charge_ns: int, queue: Queue | None
    ) -> None:
        self.request = request
        self.account = account
        self.level = level
        self.bucket = bucket  # of its deadline
        self.charge_ns = charge_ns  # what the demand test counts for it, until it is done
        self.queue = queue  # None on the device
        self.ending: Reason | None = None  # why it goes no further than the bundle that it is in
        self.begun = False
        self.again = False  # its last bundle failed, and who of it was the reason is not known yet


class Queue:
    __slots__ = (
        "place",
        "lot",
        "level",
        "costs",
        "slots",
        "items",
        "rank",
        "head_bucket",
        "head_ns",
        "serial",
        "gap_ns",
        "came_ns",
        "rate",
        "others",
        "hoped_ns",
        "luck",
        "waits",
        "hopes",
    )

    def __init__(self, place: Place, lot: int, level: Level, costs: PlaceCosts, slots: Slots, serial: int):
        self.place = place
        self.lot = lot
        self.level = level
        self.costs = costs
        self.slots = slots
        self.items: list[Item] = []
        self.rank: tuple[int, int, Queue] | None = None  # in its level: latest start, serial
        self.head_bucket = 0
        self.head_ns = 0  # counted there for the first of a run
        self.serial = serial
        self.gap_ns = FAR  # between two arrivals, smoothed
        self.came_ns: int | None = None  # the last one
        self.rate = Rate()
        self.others = Rate()  # of those whose tenants are not over their shares
        self.hoped_ns = 0  # until when company for a lone lane was worth waiting for; 0 if it is known whether it came
        self.luck = 1.0  # how often it came, smoothed
        self.waits: Any = None  # how what waits begins to be laid, as it was last; see `laying`
        self.hopes: Any = None  # the same, with those that may come

    def ready(self) -> int:
        """How many of its lanes can run now. Those that run their first segment again have their slots."""
        waiting = len(self.items)
        if not waiting or self.place[1] or self.items[0][2].again:
            return waiting
        return min(waiting, self.slots.room(self.place[0]))

    def note_arrival(self, now_ns: int, excess: float) -> None:
        """`excess`: how many times its share the tenant has had."""
        came_ns, smoothed_ns = self.came_ns, self.gap_ns
        if came_ns is not None:
            gap_ns = now_ns - came_ns
            if smoothed_ns != FAR:
                gap_ns = smoothed_ns + ((gap_ns - smoothed_ns) >> 3)
            self.gap_ns = gap_ns if gap_ns > 1 else 1
        self.came_ns = now_ns
        self.hopes = None
        self.rate.note(now_ns, self.costs.slo_ns, 1.0 if excess <= FAIR else FAIR / excess)
        if self.hoped_ns:
            self.luck += ((now_ns <= self.hoped_ns) - self.luck) / 8
            self.hoped_ns = 0


class Ladder:
    """What levels share. Whoever goes through them goes through those named here: of the others there may be many."""

    __slots__ = ("top", "waiting", "known", "crowded")

    def __init__(self) -> None:
        self.top: Level | None = None
        self.waiting: list[Level] = []  # those in which something waits, highest first
        self.known: list[Level] = []  # those that know what is to come, or how much more may, in the same order
        self.crowded: int | None = None  # from this priority downwards more runs wait than are laid

    def above(self, level: Level) -> list[Level]:
        """Where something waits above it; and the highest of all in any case, with which lanes that have begun go."""
        top, priority = self.top, level.priority
        if top is None or top is level:
            return []
        found = [top]
        for own in self.waiting:
            if own.priority <= priority:
                break
            if own is not top:
                found.append(own)
        return found

    def note(self, level: Level) -> None:
        """Something waits in it, or nothing any more."""
        waiting, level.waits = self.waiting, not level.waits
        if not level.waits:
            del waiting[-1 if waiting[-1] is level else bisect_left(waiting, -level.priority, key=downwards)]
        elif not waiting or level.priority < waiting[-1].priority:
            waiting.append(level)
        else:
            insort(waiting, level, key=downwards)

    def learn(self, level: Level) -> None:
        """It knows something, and did not."""
        level.knows, known, at = True, self.known, len(self.known)
        while at and known[at - 1].priority < level.priority:  # few are
            at -= 1
        known.insert(at, level)

    def surprise(self, priority: int) -> None:
        """What is to come is not what it was, below a priority."""
        known = self.known
        while known and known[-1].priority < priority:
            level = known.pop()
            level.outlook, level.spare, level.knows = None, 0, False

    def forget(self) -> None:
        if self.known:
            self.surprise(self.known[0].priority + 1)
        self.crowded = None


class Level:
    __slots__ = (
        "priority",
        "ladder",
        "order",
        "waits",
        "starting",
        "hopeless_ns",
        "firsts",
        "outlook",
        "spare",
        "knows",
        "demand",
        "counted",
        "below",
    )

    def __init__(self, priority: int, ladder: Ladder, base: Work):
        self.priority = priority
        self.ladder = ladder
        self.order: list[tuple[int, int, Queue]] = []
        self.waits = False  # whether there is any in it, as far as the ladder knows
        self.starting = 0  # queues in it whose lanes have not begun
        self.hopeless_ns = FAR  # as it was found last; UNKNOWN where a head or costs have changed since
        self.firsts: list[Queue] = []  # those in which everybody's requests begin
        self.outlook: Any = None  # what is to come, as far as it is known: see `outlook`
        self.spare = 0  # so many lanes may come before it is asked anew whether few runs are to come
        self.knows = False  # whether one of both is known
        self.demand = Demand(base)  # of this priority and all higher ones
        self.counted: tuple[Work, ...] = (self.demand,)  # where its lanes count: here, and in lower ones of its band
        self.below: list[Work] = []  # and in the bases of the bands below

    def is_idle(self) -> bool:
        """Nothing waits in it or above it."""
        waiting = self.ladder.waiting
        return not waiting or waiting[0].priority < self.priority

    def find_hopeless(self) -> int:
        time_ns = FAR
        for rank_ns, _, queue in self.order:
            if rank_ns >= time_ns:
                break
            time_ns = min(time_ns, queue.items[0][0] - queue.costs.alone.l50_ns + 1)
        self.hopeless_ns = time_ns
        return time_ns

    def first_hopeless(self, start_ns: int) -> Lane | None:
        """A head that would be late even if it ran then, and ran no longer than it mostly does."""
        for rank_ns, _, queue in self.order:
            if rank_ns >= start_ns:
                return None
            deadline_ns, _, lane = queue.items[0]
            if start_ns + queue.costs.alone.l50_ns > deadline_ns:
                return lane
        return None

    def promise(self, bucket: int, work_ns: int) -> None:
        for work in self.counted:
            work.add(bucket, work_ns)
        for work in self.below:
            work.add(bucket, work_ns)

    def release(self, bucket: int, work_ns: int) -> None:
        for work in self.counted:
            work.remove(bucket, work_ns)
        for work in self.below:
            work.remove(bucket, work_ns)


def downwards(level: Level) -> int:
    return -level.priority
