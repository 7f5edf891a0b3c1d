"""What waits, where, and until when it can be in time."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable

from coalesce.scheduler.baselines.menu import fastest, Menu
from coalesce.scheduler.commands import Reason
from coalesce.scheduler.costs import FAR, Place
from coalesce.scheduler.request import Request
from coalesce.scheduler.shares import Account

TRY_NS = 50_000_000

Key = tuple[int, Place, int, str]  # priority, place, lot, and the tenant where tenants wait apart


class Lane:
    """A request on its way through the segments of its family."""

    __slots__ = ("request", "account", "priority", "queue", "begun", "ending")

    def __init__(self, request: Request, account: Account) -> None:
        self.request = request
        self.account = account
        self.priority = account.tenant.priority + request.priority
        self.queue: Queue | None = None  # None on the device
        self.begun = False
        self.ending: Reason | None = None  # why it goes no further than the bundle that it is in


class Queue:
    """Lanes that may share a bundle, in the policy's order. The lot is 0, or a number for half of a failed bundle."""

    __slots__ = ("key", "items")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.items: list[tuple[int, int, Lane]] = []  # rank, id: no two are equal, so that lanes are never compared

    @property
    def priority(self) -> int:
        return self.key[0]

    @property
    def place(self) -> Place:
        return self.key[1]

    @property
    def lot(self) -> int:
        return self.key[2]


class Waiting:
    """All queues with something in them."""

    def __init__(self, menu: Menu, rank: Callable[[Request], int], apart: bool) -> None:
        self._menu, self._rank, self._apart = menu, rank, apart
        self._queues: dict[Key, Queue] = {}
        self._latest: list[tuple[int, int, Queue, Lane]] = []  # starts; a heap, also of lanes that have left the queue
        self._tried: dict[int, tuple[int, int]] = {}  # by family: when the last one came that was tried, and its id
        self._serial = 0

    def queues(self) -> Iterable[Queue]:
        return self._queues.values()

    def put(self, lane: Lane, place: Place, lot: int = 0) -> None:
        key = (lane.priority, place, lot, lane.request.tenant if self._apart else "")
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = Queue(key)
        insort(queue.items, (self._rank(lane.request), lane.request.id, lane))
        lane.queue = queue
        self._push(lane, queue)

    def take(self, lane: Lane) -> None:
        queue = lane.queue
        assert queue is not None, f"request {lane.request.id} does not wait"
        del queue.items[bisect_left(queue.items, (self._rank(lane.request), lane.request.id))]
        lane.queue = None
        if not queue.items:
            del self._queues[queue.key]

    def latest_ns(self) -> int:
        """The least of the latest starts with which lanes are in time."""
        latest = self._latest
        while latest and latest[0][3].queue is not latest[0][2]:
            heapq.heappop(latest)
        return latest[0][0] if latest else FAR

    def first(self) -> Lane:
        """Whose it is; to be asked after `latest_ns`."""
        return self._latest[0][3]

    def refresh(self) -> None:
        """Latencies have moved."""
        lanes = [(queue, lane) for queue in self._queues.values() for _, _, lane in queue.items]
        self._latest.clear()
        for queue, lane in lanes:
            self._push(lane, queue)

    def _push(self, lane: Lane, queue: Queue) -> None:
        self._serial += 1
        heapq.heappush(self._latest, (self._latest_start(lane, queue.place), self._serial, queue, lane))

    def _latest_start(self, lane: Lane, place: Place) -> int:
        """By the l99 of a run alone; by its median, where by that its tenant could never be in time.

        Where by the median it could not be either, one request after another is tried nevertheless: a prediction that
        rules everybody out may be wrong, and would never be put right.
        """
        request, options = lane.request, self._menu.of(place)
        if not options:
            return request.deadline_ns
        l50, l99 = fastest(options).through
        slo_ns = lane.account.tenant.slo_ns
        if l50 > slo_ns and self._is_tried(request):
            return request.deadline_ns
        return request.deadline_ns - (l99 if l99 <= slo_ns else l50)

    def _is_tried(self, request: Request) -> bool:
        tried_ns, tried = self._tried.get(request.family, (-FAR, -1))
        if tried != request.id and request.arrival_ns - tried_ns < TRY_NS:
            return False
        self._tried[request.family] = (max(tried_ns, request.arrival_ns), request.id)
        return True
