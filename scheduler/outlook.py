"""What is to come: the runs that everything would be served in that waits, and what they leave for others.

    free_ns  [ queue a, 16 lanes ][ queue b, 9 lanes of 16 ][ queue a, 3 lanes of 4, hoped to be 14 of 16 ]

Runs are laid one after the other, the queue whose head is due first at every turn, in the runs that do its lanes
soonest (`cover`). A run whose head would be late becomes narrower; it is *hurried* if that makes it inefficient. Runs
take as long as they mostly do. By how much they may take longer adds up as errors do, and by how much heads would then
be late makes an outlook *tardy*. The next run that is dispatched is the first one here.

A second outlook lays every run as wide as it is hoped to become until its turn (`hopes`).

A request is taken on where neither becomes more tardy with it, and its own queue is not hurried. So it may come to a
run that is there anyway, which costs nothing; and it may begin one of its own where that has time to become as wide as
its kind becomes at this rate. At low rates that is a run of one lane. At high ones whoever would force narrow runs on
everybody is refused, and what is served is served in wide ones. What is promised is held against the first outlook
without what may go wrong, so that a run that took a little longer makes none of the next ones narrow.

Nothing is held against a level by those below it.
"""

from __future__ import annotations

from heapq import heapify, heappop, heapreplace
from math import hypot
from typing import NamedTuple

from coalesce.scheduler.cover import Cover, Option
from coalesce.scheduler.hopes import has_time, have_room, hoped
from coalesce.scheduler.queues import Level, Queue

FEW = 32  # runs


class Begun(NamedTuple):
    """Lanes on the device that have more segments ahead, in a run of these together."""

    due_ns: int
    option: Option


class Start(NamedTuple):
    """When the device begins with what waits."""

    free_ns: int  # it is done with what it has
    begun: tuple[Begun, ...] = ()
    slip_ns: float = 0.0  # by how much it may be later


class Newcomer(NamedTuple):
    """A request that may come to a queue."""

    queue: Queue
    due_ns: int
    at: int  # behind so many of its queue


class Laid(NamedTuple):
    """A run of a queue."""

    left: int  # lanes of the queue that are not in runs before it
    option: Option
    start_ns: int
    whole: bool  # it is not narrower than it would be with more time


# due next, serial, the queue, its lanes that are served, all of them, where the newcomer is in them or -1, the run to
# begin with, lanes that are hoped for in the runs so far
Waiting = tuple[int, int, Queue | None, int, int, int, Option, int]


class Outlook:
    __slots__ = ("late", "tardy_ns", "hurried", "first", "runs", "end_ns", "slip_ns")

    def __init__(self, slip_ns: float) -> None:
        self.late = 0  # lanes for which even the narrowest run is too long
        self.tardy_ns = 0.0
        self.hurried: set[int] = set()  # queues, by serial
        self.first: tuple[Queue, Option] | None = None
        self.runs: dict[int, list[Laid]] = {}  # of a queue, by serial
        self.end_ns = 0
        self.slip_ns = slip_ns  # by how much that may be later

    def bears(self, queue: Queue, other: Outlook) -> bool:
        """Whether one more of a queue makes nothing worse, with whom it is as in `other`."""
        return other.tardy_ns <= self.tardy_ns and queue.serial not in other.hurried

    def is_good(self, queue: Queue) -> bool:
        """Whether nothing is bad in it, whatever it was without one more of a queue."""
        return not self.tardy_ns and queue.serial not in self.hurried

    def has_room(self, new: Newcomer) -> bool:
        """Whether it comes to the last run of its queue, with everything else as it is."""
        runs, items = self.runs.get(new.queue.serial), new.queue.items
        if runs is None or new.at < len(items) or self.late:
            return False
        more = len(items) + 1 - runs[0].left  # some may have come since
        last = runs[-1]
        if last.left + more > last.option.width or new.due_ns < last.start_ns + last.option.through_ns:
            return False
        first = new.queue.costs.cover.first
        return all(run.whole and first(run.left + more) is run.option for run in runs)

    def keeps_room(self, level: Level, now_ns: int) -> bool:
        """Whether those who are owed something still find places in runs of their queues, or the time for one."""
        done_ns, kinds = self.end_ns + 2 * self.slip_ns, len(level.firsts)
        if kinds > FEW:
            return True
        for queue in level.firsts:
            if queue.others.until_ns > now_ns:
                runs = self.runs.get(queue.serial)
                if not (have_room(queue, runs, done_ns, now_ns) if runs else has_time(queue, done_ns, now_ns, kinds)):
                    return False
        return True


class Known:
    """What has been laid since something changed."""

    __slots__ = ("start", "sure", "hoped", "closed")

    def __init__(self, start: Start) -> None:
        self.start = start
        self.sure: Outlook | None = None
        self.hoped: Outlook | None = None
        self.closed: dict[int, float] = {}  # until when whoever is due is refused, by the queue's serial


def is_few(level: Level) -> bool:
    """Whether what waits is run in few enough runs to lay them at every turn."""
    runs = 0
    for own in (*level.above, level):
        runs += len(own.order)
        if runs > FEW:
            return False
        for _, _, queue in own.order:
            runs += len(queue.items) // queue.costs.cover.widest
    return runs <= FEW


def known(level: Level, start: Start, now_ns: int) -> Outlook:
    """As it was laid last, where nothing has changed since."""
    found = remembered(level, start)
    if found.sure is None:
        found.sure = outlook(level, start, now_ns)
    return found.sure


def known_hoped(level: Level, start: Start, now_ns: int) -> Outlook:
    found = remembered(level, start)
    if found.hoped is None:
        found.hoped = outlook(level, start, now_ns, hope=True)
    return found.hoped


def remembered(level: Level, start: Start) -> Known:
    if level.outlook is None or level.outlook.start != start:
        level.outlook = Known(start)
    return level.outlook


def remember(level: Level, start: Start, sure: Outlook, hoped: Outlook) -> None:
    """The newcomer of these has come."""
    level.outlook = found = Known(start)
    found.sure, found.hoped = sure, hoped


def close(level: Level, start: Start, new: Newcomer, tardy_ns: float) -> bool:
    """One was refused that would make others, or be itself, late by so much: who comes behind it would too, unless it
    is due later by that."""
    if new.at == len(new.queue.items) and tardy_ns > 0:
        remembered(level, start).closed[new.queue.serial] = new.due_ns + tardy_ns
    return False


def is_closed(level: Level, start: Start, new: Newcomer) -> bool:
    if new.at < len(new.queue.items):
        return False
    return new.due_ns < remembered(level, start).closed.get(new.queue.serial, 0.0)


def outlook(level: Level, start: Start, now_ns: int, new: Newcomer | None = None, hope: bool = False) -> Outlook:
    """All of this level, after all of those above it."""
    time_ns, begun = start.free_ns, start.begun
    for above in level.above:
        time_ns = lay(above, Outlook(start.slip_ns), time_ns, begun, now_ns, None, hope)
        begun = ()
    found = Outlook(start.slip_ns)
    lay(level, found, time_ns, begun, now_ns, new, hope)
    return found


def lay(
    level: Level, found: Outlook, time_ns: int, begun: tuple[Begun, ...], now_ns: int, new: Newcomer | None, hope: bool
) -> int:
    """Lays the runs of one level; returns when they are done."""
    heap = waiting_in(level, begun, new)
    slip_ns = found.slip_ns
    while heap:
        due_ns, serial, queue, served, count, at, whole, taken = heap[0]
        if queue is None:
            time_ns += whole.mostly_ns
            slip_ns = hypot(slip_ns, whole.slip_ns)
            heappop(heap)
            continue
        waiting, option, given_up = count - served, whole, False
        new_here = queue.place[1] == 0  # lanes that have begun stay together
        if new_here and time_ns + option.mostly_ns + hypot(option.slip_ns, slip_ns) > due_ns:
            option = fitting(queue.costs.cover, option, waiting, due_ns - time_ns, slip_ns)
            given_up = time_ns + option.mostly_ns > due_ns
        if hope and new_here and not queue.lot and not given_up:
            option, taken = hoped(queue, option, waiting, time_ns - now_ns, taken, len(level.firsts))
        end_ns = time_ns + option.mostly_ns
        found.tardy_ns += max(0.0, end_ns + hypot(option.slip_ns, slip_ns) - due_ns)
        if end_ns > due_ns or (not hope and option is not whole and is_inefficient(option, whole, waiting)):
            found.hurried.add(serial)
        if given_up:
            found.late += 1
            served += 1
        else:
            if found.first is None:
                found.first = queue, option
            found.runs.setdefault(serial, []).append(Laid(waiting, option, time_ns, option is whole))
            time_ns, slip_ns = end_ns, hypot(slip_ns, option.slip_ns)
            served += min(option.width, waiting)
        if served < count:
            option = queue.costs.cover.first(count - served)
            heapreplace(heap, (due_at(queue, new, at, served), serial, queue, served, count, at, option, taken))
        else:
            heappop(heap)
    found.end_ns, found.slip_ns = time_ns, slip_ns
    return time_ns


def waiting_in(level: Level, begun: tuple[Begun, ...], new: Newcomer | None) -> list[Waiting]:
    heap: list[Waiting] = [(own.due_ns, -i, None, 0, 0, -1, own.option, 0) for i, own in enumerate(begun)]
    for _, serial, queue in level.order:
        if not queue.costs.options:
            continue
        count, at = len(queue.items), -1
        if new is not None and new.queue is queue:
            count, at = count + 1, new.at
        first = queue.costs.cover.first(count)
        heap.append((due_at(queue, new, at, 0), serial, queue, 0, count, at, first, 0))
    if new is not None and not new.queue.items:
        heap.append((new.due_ns, new.queue.serial, new.queue, 0, 1, 0, new.queue.costs.cover.first(1), 0))
    heapify(heap)
    return heap


def due_at(queue: Queue, new: Newcomer | None, at: int, number: int) -> int:
    """When a lane of a queue is due, counted with the newcomer."""
    if new is None or at < 0 or number < at:
        return queue.items[number][0]
    return new.due_ns if number == at else queue.items[number - 1][0]


def fitting(cover: Cover, whole: Option, waiting: int, left_ns: int, slip_ns: float) -> Option:
    """A narrower run: one that is in time whatever happens if that is about as efficient, or one that mostly is."""
    if whole.mostly_ns > left_ns:
        return cover.within(left_ns, waiting)
    sure = cover.within(left_ns, waiting, slip_ns)
    as_good = 10 * sure.mostly_ns * min(whole.width, waiting) <= 11 * whole.mostly_ns * min(sure.width, waiting)
    return sure if as_good else whole


def is_inefficient(option: Option, whole: Option, waiting: int) -> bool:
    return 4 * option.mostly_ns * min(whole.width, waiting) > 5 * whole.mostly_ns * option.width
