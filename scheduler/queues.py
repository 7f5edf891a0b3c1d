"""All that waits, in its queues (`lanes`): put in, taken out to be run, dropped, moved, and in order."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Container, Iterator, Sequence

from coalesce.scheduler.costs import Place, PlaceCosts
from coalesce.scheduler.demand import FAR, GRID_BITS
from coalesce.scheduler.lanes import downwards, Item, Lane, Level, Queue, UNKNOWN
from coalesce.scheduler.levels import Levels
from coalesce.scheduler.request import Request
from coalesce.scheduler.shares import Account
from coalesce.scheduler.slots import Slots


class Queues:
    def __init__(self, costs_of: Callable[[Place, int], PlaceCosts], slots: Slots):
        self._levels = Levels()
        self._ladder = self._levels.ladder
        self.levels = self._levels.all  # highest priority first
        self.waiting = self._ladder.waiting  # those in which something waits
        self._costs_of = costs_of
        self._slots = slots
        self._queues: dict[tuple[int, int, int, int], Queue] = {}  # family, segment, lot, priority
        self._serial = 0
        self.hopeless_ns = UNKNOWN  # as it was found last, with the heads and costs as they are

    def find_hopeless(self) -> int:
        """From when on a head would be late even if it ran alone, as long as runs mostly take; FAR without heads."""
        times = [own.find_hopeless() if own.hopeless_ns == UNKNOWN else own.hopeless_ns for own in self.waiting]
        self.hopeless_ns = min(times, default=FAR)
        return self.hopeless_ns

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
        return queue if queue is not None else self.find((family, 0), lot, self._levels.get(priority))

    def beside(self, queue: Queue, place: Place) -> Queue | None:
        """Another place's queue of the same lot and priority."""
        return self._queues.get((*place, queue.lot, queue.level.priority))

    def lower(self, queue: Queue) -> Iterator[Queue]:
        """Of the same place and lot, those with a lower priority in which something waits, in its order."""
        if len(self.levels) == 1:
            return
        at = bisect_right(self.waiting, downwards(queue.level), key=downwards)
        for level in self.waiting[at:]:
            other = self._queues.get((*queue.place, queue.lot, level.priority))
            if other is not None and other.items:
                yield other

    def add(self, request: Request, account: Account, queue: Queue, now_ns: int, foreseen: bool) -> Lane:
        """A new one. `foreseen`: the outlook has it already."""
        number, _, _, _, deadline_ns, _ = request
        level, lane_ns = queue.level, queue.costs.lane_ns
        bits = (deadline_ns - now_ns).bit_length() - GRID_BITS
        bucket = deadline_ns & -(1 << bits) if bits > 0 else deadline_ns  # as `bucket_of`, for every request
        if not foreseen or len(self.levels) > 1:
            self._ladder.surprise(level.priority + (not foreseen))
        account.waiting += 1
        account.pending += 1
        lane = Lane(request, account, level, bucket, lane_ns, queue)
        if lane_ns:  # as `promise`, for every request
            for work in level.counted:
                work.add(bucket, lane_ns)
            for work in level.below:
                work.add(bucket, lane_ns)
        self._insert((deadline_ns, number, lane), queue)
        return lane

    def put(self, lane: Lane, queue: Queue) -> None:
        """Puts it in at its deadline, and counts what it has ahead."""
        level, request, lane_ns = lane.level, lane.request, queue.costs.lane_ns
        self._ladder.surprise(level.priority + 1)
        lane.queue = queue
        change = lane_ns - lane.charge_ns
        if change:
            lane.charge_ns = lane_ns
            level.promise(lane.bucket, change)
        self._insert((request.deadline_ns, request.id, lane), queue)

    def _insert(self, item: Item, queue: Queue) -> None:
        items = queue.items
        queue.level.spare -= 1
        queue.waits = queue.hopes = None
        if items and item > items[-1]:
            items.append(item)
            return
        insort(items, item)
        if items[0][2] is item[2]:
            self.rank(queue)

    def put_all(self, lanes: Sequence[Lane], queue: Queue) -> None:
        """Lanes of one run, where there are no other levels."""
        items = queue.items
        new = sorted([(lane.request.deadline_ns, lane.request.id, lane) for lane in lanes])
        if items and new[0] < items[-1]:
            for lane in lanes:
                self.put(lane, queue)
            return
        level, lane_ns = queue.level, queue.costs.lane_ns
        self._ladder.surprise(level.priority + 1)
        for lane in lanes:
            lane.queue = queue
            change = lane_ns - lane.charge_ns
            if change:
                lane.charge_ns = lane_ns
                level.demand.add(lane.bucket, change)
        was_empty = not items
        items += new
        queue.waits = queue.hopes = None
        if was_empty:
            self.rank(queue)

    def take(self, queue: Queue, first: int, end: int) -> list[Lane]:
        """Takes lanes out to be run; what they have ahead after it stays counted."""
        self._ladder.surprise(queue.level.priority + 1)
        after_ns = queue.costs.lane_after_ns
        lanes = [lane for _, _, lane in queue.items[first:end]]
        bucket = work_ns = begin = 0
        for lane in lanes:
            lane.queue = None
            if lane.bucket != bucket:  # few: they are in order of their deadlines
                queue.level.release(bucket, work_ns)
                bucket, work_ns = lane.bucket, 0
            work_ns += lane.charge_ns - after_ns
            lane.charge_ns = after_ns
            if not lane.begun:
                lane.begun = True
                lane.account.waiting -= 1
                begin += 1
        if begin:
            self._slots.take(queue.place[0], begin)
        queue.level.release(bucket, work_ns)
        self._cut(queue, first, end)
        return lanes

    def drop(self, lane: Lane) -> None:
        """Takes one out that goes no further."""
        queue = lane.queue
        assert queue is not None, f"request {lane.request.id} does not wait"
        self._ladder.surprise(lane.level.priority + 1)
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

    def _cut(self, queue: Queue, first: int, end: int) -> None:
        del queue.items[first:end]
        queue.waits = queue.hopes = None
        crowded = self._ladder.crowded
        if crowded is not None and crowded <= queue.level.priority:
            self._ladder.crowded = None
        if first == 0:
            self.rank(queue)

    def rank(self, queue: Queue) -> None:
        """Finds its place in its level anew: its head or its costs have changed."""
        level = queue.level
        self.hopeless_ns = level.hopeless_ns = UNKNOWN
        if queue.rank is not None:
            del level.order[bisect_left(level.order, queue.rank)]
            level.starting -= queue.place[1] == 0
            level.release(queue.head_bucket, queue.head_ns)
        if not queue.items:
            queue.rank = None
            if level.waits and not level.order:
                self._ladder.note(level)
            self.discard(queue)
            return
        deadline_ns, _, lane = queue.items[0]
        queue.rank = (deadline_ns - queue.costs.ahead_ns, queue.serial, queue)
        insort(level.order, queue.rank)
        if not level.waits:
            self._ladder.note(level)
        level.starting += queue.place[1] == 0
        queue.head_bucket, queue.head_ns = lane.bucket, queue.costs.first_ns
        level.promise(queue.head_bucket, queue.head_ns)

    def discard(self, queue: Queue) -> None:
        """Lots come and go, with nobody in them."""
        if queue.lot and not queue.items:
            self._queues.pop((*queue.place, queue.lot, queue.level.priority), None)

    def refresh(self, families: Container[int] | None = None) -> None:
        """Costs have changed, of all families or of some; of lots they may at any time."""
        self._ladder.forget()
        for queue in list(self._queues.values()):
            if families is not None and queue.place[0] not in families and not queue.lot:
                continue
            queue.costs = self._costs_of(queue.place, queue.lot)
            queue.waits = queue.hopes = None
            if queue.items:
                self.rank(queue)
            elif not queue.costs.options:  # its family has gone, for all that is known
                del self._queues[(*queue.place, queue.lot, queue.level.priority)]
                queue.level.firsts = [other for other in queue.level.firsts if other is not queue]

    def keep_levels(self, busy: Container[int]) -> None:
        """Forgets the priorities that nobody has any more."""
        self._levels.keep(busy)
        self._queues = {key: queue for key, queue in self._queues.items() if queue.level.priority in busy}
