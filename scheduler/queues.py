"""What waits, where, and in which order.

    Lane      a request on its way through the segments of its family
    Queue     lanes that may share a bundle, by deadline: of one place, one lot and one priority
    Level     the queues of one priority, by the latest start of their heads, and what was promised from it upwards
    Queues    all of them

The lot is 0 for everybody, and another number for those that run apart: tenants in quarantine, and what is left of a
bundle that failed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Container, Iterable
from typing import Any

from coalesce.scheduler.commands import Reason
from coalesce.scheduler.costs import Place, PlaceCosts
from coalesce.scheduler.demand import Demand, FAR
from coalesce.scheduler.rate import FAIR, Rate, smoothed
from coalesce.scheduler.request import Request
from coalesce.scheduler.shares import Account
from coalesce.scheduler.slots import Slots

Item = tuple[int, int, "Lane"]  # deadline, id: no two are equal, so that lanes are never compared


class Lane:
    __slots__ = ("request", "account", "level", "bucket", "charge_ns", "queue", "ending", "begun", "again", "foreseen")

    def __init__(self, request: Request, account: Account, level: Level, bucket: int):
        self.request = request
        self.account = account
        self.level = level
        self.bucket = bucket  # of its deadline
        self.charge_ns = 0  # what the demand test counts for it, until it is done
        self.queue: Queue | None = None  # None on the device
        self.ending: Reason | None = None  # why it goes no further than the bundle that it is in
        self.begun = False
        self.foreseen = False  # the outlook had a place for it
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

    def ready(self) -> int:
        """How many of its lanes can run now. Those that run their first segment again have their slots."""
        waiting = len(self.items)
        if not waiting or self.place[1] or self.items[0][2].again:
            return waiting
        return min(waiting, self.slots.room(self.place[0]))

    def leads(self, request: Request) -> bool:
        """Whether it would be its head."""
        return not self.items or request.deadline_ns < self.items[0][0]

    def note_arrival(self, now_ns: int, excess: float) -> None:
        """`excess`: how many times its share the tenant has had."""
        if self.came_ns is not None:
            self.gap_ns = smoothed(self.gap_ns, now_ns - self.came_ns)
        self.came_ns = now_ns
        self.rate.note(now_ns, self.costs.slo_ns, 1.0 if excess <= FAIR else FAIR / excess)
        if self.hoped_ns:
            self.luck += ((now_ns <= self.hoped_ns) - self.luck) / 8
            self.hoped_ns = 0


class Level:
    __slots__ = ("priority", "order", "starting", "demand", "counted", "above", "outlook", "firsts")

    def __init__(self, priority: int):
        self.priority = priority
        self.order: list[tuple[int, int, Queue]] = []
        self.starting = 0  # queues in it whose lanes have not begun
        self.firsts: list[Queue] = []  # those in which everybody's requests begin
        self.above: tuple[Level, ...] = ()  # higher priorities, highest first
        self.outlook: Any = None  # what is to come, as far as it is known: see `outlook`
        self.demand = Demand()  # of this priority and all higher ones
        self.counted: tuple[Demand, ...] = (self.demand,)  # those in which its lanes count: its own and all lower ones

    def promise(self, bucket: int, work_ns: int) -> None:
        if len(self.counted) == 1:
            self.demand.add(bucket, work_ns)
            return
        for demand in self.counted:
            demand.add(bucket, work_ns)

    def release(self, bucket: int, work_ns: int) -> None:
        for demand in self.counted:
            demand.remove(bucket, work_ns)


class Queues:
    def __init__(self, costs_of: Callable[[Place, int], PlaceCosts], slots: Slots):
        self.levels: list[Level] = []  # highest priority first
        self._costs_of = costs_of
        self._slots = slots
        self._levels: dict[int, Level] = {}
        self._queues: dict[tuple[int, int, int, int], Queue] = {}  # family, segment, lot, priority
        self._serial = 0

    def level(self, priority: int) -> Level:
        known = self._levels.get(priority)
        return known if known is not None else self._add_level(priority)

    def find(self, place: Place, lot: int, level: Level) -> Queue:
        key = (*place, lot, level.priority)
        queue = self._queues.get(key)
        if queue is None:
            self._serial += 1
            costs = self._costs_of(place, lot)
            queue = self._queues[key] = Queue(place, lot, level, costs, self._slots, self._serial)
            if place[1] == 0 and lot == 0:
                level.firsts.append(queue)
        return queue

    def first(self, family: int, lot: int, priority: int) -> Queue:
        """Where requests of a family begin."""
        queue = self._queues.get((family, 0, lot, priority))
        return queue if queue is not None else self.find((family, 0), lot, self.level(priority))

    def beside(self, queue: Queue, place: Place) -> Queue | None:
        """Another place's queue of the same lot and priority."""
        return self._queues.get((*place, queue.lot, queue.level.priority))

    def lower(self, queue: Queue) -> Iterable[Queue]:
        """Of the same place and lot, those with a lower priority, in its order."""
        if len(self.levels) == 1:
            return ()
        found = (self._queues.get((*queue.place, queue.lot, level.priority)) for level in self.levels)
        return [q for q in found if q is not None and q.level.priority < queue.level.priority]

    def put(self, lane: Lane, queue: Queue, foreseen: bool = False) -> None:
        """Puts it in at its deadline, and counts what it has ahead. `foreseen`: the outlook has it already."""
        self._surprise(lane.level, foreseen)
        item = (lane.request.deadline_ns, lane.request.id, lane)
        items = queue.items
        lane.queue = queue
        change = queue.costs.lane_ns - lane.charge_ns
        if change:
            lane.charge_ns = queue.costs.lane_ns
            lane.level.promise(lane.bucket, change)
        if items and item > items[-1]:
            items.append(item)
            return
        insort(items, item)
        if items[0] is item:
            self.rank(queue)

    def take(self, queue: Queue, first: int, end: int) -> list[Lane]:
        """Takes lanes out to be run; what they have ahead after it stays counted."""
        self._surprise(queue.level)
        after_ns = queue.costs.lane_after_ns
        lanes = [item[2] for item in queue.items[first:end]]
        done: dict[int, int] = {}
        for lane in lanes:
            lane.queue = None
            done[lane.bucket] = done.get(lane.bucket, 0) + lane.charge_ns - after_ns
            lane.charge_ns = after_ns
            if not lane.begun:
                lane.begun = True
                lane.account.waiting -= 1
                self._slots.take(lane.request.family)
        for bucket, work_ns in done.items():
            queue.level.release(bucket, work_ns)
        self._cut(queue, first, end)
        return lanes

    def forget(self, lane: Lane) -> None:
        """It has ended, and waits nowhere."""
        if lane.charge_ns:
            lane.level.release(lane.bucket, lane.charge_ns)
        if lane.begun:
            self._slots.release(lane.request.family)

    def drop(self, lane: Lane) -> None:
        """Takes one out that goes no further."""
        queue = lane.queue
        assert queue is not None, f"request {lane.request.id} does not wait"
        self._surprise(lane.level)
        lane.queue = None
        lane.level.release(lane.bucket, lane.charge_ns)
        lane.charge_ns = 0
        if not lane.begun:
            lane.account.waiting -= 1
        at = bisect_left(queue.items, (lane.request.deadline_ns, lane.request.id))
        self._cut(queue, at, at + 1)

    def move(self, lane: Lane, queue: Queue) -> None:
        """To another lot."""
        old = lane.queue
        assert old is not None, f"request {lane.request.id} does not wait"
        if old is queue:  # it came here in the event that moved its tenant
            return
        at = bisect_left(old.items, (lane.request.deadline_ns, lane.request.id))
        self._cut(old, at, at + 1)
        self.put(lane, queue)

    def _surprise(self, level: Level, foreseen: bool = False) -> None:
        """What is to come is not what it was, from this level downwards; `foreseen`: from the next one."""
        for other in self.levels:
            if other.priority < level.priority + (not foreseen):
                other.outlook = None

    def _cut(self, queue: Queue, first: int, end: int) -> None:
        del queue.items[first:end]
        if first == 0:
            self.rank(queue)

    def rank(self, queue: Queue) -> None:
        """Finds its place in its level anew: its head or its costs have changed."""
        level = queue.level
        if queue.rank is not None:
            del level.order[bisect_left(level.order, queue.rank)]
            level.starting -= queue.place[1] == 0
            level.release(queue.head_bucket, queue.head_ns)
        if not queue.items:
            queue.rank = None
            self.discard(queue)
            return
        deadline_ns, _, lane = queue.items[0]
        queue.rank = (deadline_ns - queue.costs.ahead_ns, queue.serial, queue)
        insort(level.order, queue.rank)
        level.starting += queue.place[1] == 0
        queue.head_bucket, queue.head_ns = lane.bucket, queue.costs.first_ns
        level.promise(queue.head_bucket, queue.head_ns)

    def discard(self, queue: Queue) -> None:
        """Lots come and go, with nobody in them."""
        if queue.lot and not queue.items:
            self._queues.pop((*queue.place, queue.lot, queue.level.priority), None)

    def refresh(self) -> None:
        """Costs have changed."""
        self._order_levels()
        for queue in list(self._queues.values()):
            queue.costs = self._costs_of(queue.place, queue.lot)
            if queue.items:
                self.rank(queue)
            elif not queue.costs.options:  # its family has gone, for all that is known
                del self._queues[(*queue.place, queue.lot, queue.level.priority)]
                queue.level.firsts = [other for other in queue.level.firsts if other is not queue]

    def _add_level(self, priority: int) -> Level:
        """Everything that was promised above it counts in it."""
        level = self._levels[priority] = Level(priority)
        self._order_levels()
        above = self.levels.index(level)
        if above:
            level.demand.take_over(self.levels[above - 1].demand)
        return level

    def _order_levels(self) -> None:
        self.levels = sorted(self._levels.values(), key=lambda level: -level.priority)
        for at, upper in enumerate(self.levels):
            upper.counted = tuple(below.demand for below in self.levels[at:])
            upper.above, upper.outlook = tuple(self.levels[:at]), None

    def keep_levels(self, busy: Container[int]) -> None:
        """Forgets the priorities that nobody has any more."""
        self._levels = {priority: level for priority, level in self._levels.items() if priority in busy}
        self._queues = {key: queue for key, queue in self._queues.items() if queue.level.priority in busy}
        self._order_levels()
