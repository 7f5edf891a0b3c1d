"""What waits, where, and in which order.

    Lane      a request on its way through the segments of its family
    Queue     lanes that may share a bundle, by deadline: of one place, one lot and one priority
    Level     the queues of one priority, by the latest start of their heads, and what was promised from it upwards

The lot is 0 for everybody, and another number for those that run apart: tenants in quarantine, and what is left of a
bundle that failed.
"""

from __future__ import annotations

from typing import Any

from coalesce.scheduler.commands import Reason
from coalesce.scheduler.costs import Place, PlaceCosts
from coalesce.scheduler.demand import Demand, FAR
from coalesce.scheduler.rate import FAIR, Rate
from coalesce.scheduler.request import Request
from coalesce.scheduler.shares import Account
from coalesce.scheduler.slots import Slots

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


class Level:
    __slots__ = (
        "priority",
        "order",
        "starting",
        "demand",
        "counted",
        "above",
        "outlook",
        "spare",
        "is_crowded",
        "firsts",
    )

    def __init__(self, priority: int):
        self.priority = priority
        self.order: list[tuple[int, int, Queue]] = []
        self.starting = 0  # queues in it whose lanes have not begun
        self.firsts: list[Queue] = []  # those in which everybody's requests begin
        self.above: tuple[Level, ...] = ()  # higher priorities, highest first
        self.outlook: Any = None  # what is to come, as far as it is known: see `outlook`
        self.spare = 0  # so many lanes may come before it is asked anew whether few runs are to come
        self.is_crowded = False  # more are, until some lanes go
        self.demand = Demand()  # of this priority and all higher ones
        self.counted: tuple[Demand, ...] = (self.demand,)  # those in which its lanes count: its own and all lower ones

    def hopeless_ns(self) -> int:
        time_ns = FAR
        for rank_ns, _, queue in self.order:
            if rank_ns >= time_ns:
                break
            time_ns = min(time_ns, queue.items[0][0] - queue.costs.alone.l50_ns + 1)
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
        for demand in self.counted:
            demand.add(bucket, work_ns)

    def release(self, bucket: int, work_ns: int) -> None:
        for demand in self.counted:
            demand.remove(bucket, work_ns)
