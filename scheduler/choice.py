"""Which run is next: the window rule.

As long as nothing that was promised is late in the outlook, its first run is next, or, where nobody else waits and more
lanes are to come, a narrower one that is full. Where more waits than it is laid for, and everything that was promised
can be done, that is the queue whose head has the least latest start, from its head, in the width that does most lanes a
second and lets its head, and the head of the queue after it, be in time.
Otherwise that would collapse: the head that is nearly late forces ever smaller runs. Then the best run may start
anywhere in a queue's lanes by deadline, and those in front of it are left for later, or to be late.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from coalesce.scheduler.costs import is_short, MARKEDLY, Option
from coalesce.scheduler.lanes import Item, Level, Queue
from coalesce.scheduler.laying import Outlook, Start
from coalesce.scheduler.outlook import is_few, known
from coalesce.scheduler.tuples import made

CANDIDATES = 4  # queues that are looked at where not everything can be done


class Window(NamedTuple):
    """A run of lanes of one queue, `first` to `end` by deadline."""

    queue: Queue
    option: Option
    first: int
    end: int

    @property
    def lanes(self) -> int:
        return self.end - self.first

    @property
    def latest_ns(self) -> int:
        """The latest start with which its first lane is in time."""
        return self.queue.items[self.first][0] - self.option.through_ns


def choose(level: Level, start: Start, now_ns: int, cap_ns: int, worth: Callable[[Item], float]) -> Window | None:
    start_ns = start.free_ns
    if is_few(level):
        ahead = known(level, start, now_ns)
        if not ahead.late:
            return foreseen(ahead) or earliest(level, start_ns, cap_ns)
    elif level.demand.is_feasible(start_ns):
        return earliest(level, start_ns, cap_ns)
    found = [w for q in islice(servable(level), CANDIDATES) if (w := best_window(q, start_ns, cap_ns, worth))]
    return min(found, key=lambda w: (w.latest_ns, w.option.l99_ns / w.lanes), default=None)


def foreseen(ahead: Outlook) -> Window | None:
    """The first run of all that are to come, with the lanes that are there."""
    first = ahead.first
    if first is None or not first[0].ready():
        return None
    queue, hoped, start_ns = first
    lanes, option = min(hoped.width, queue.ready()), None
    for other in queue.costs.options:
        if other.width < lanes:
            continue
        if option is None or MARKEDLY * other.mostly_ns < (MARKEDLY - 1) * option.mostly_ns:
            option = other
    assert option is not None, f"{lanes} lanes of {hoped.width}, for which there is no executable"
    return full(queue, option, lanes, start_ns) or made(Window, (queue, option, 0, lanes))


def full(queue: Queue, option: Option, lanes: int, start_ns: int) -> Window | None:
    """A narrower run that does more lanes a second, where nobody else waits: who is left over is in time with those
    that come meanwhile, in the run that they need anyway."""
    if queue.place[1] or queue.lot or len(queue.level.order) > 1:
        return None
    best, lane_ns = None, option.mostly_ns / lanes
    for narrower in queue.costs.cover.options:
        width = narrower.width
        if width >= lanes:
            break
        coming = int(narrower.mostly_ns * queue.rate.per_ns)
        after_ns = queue.costs.cover.first(lanes - width + coming).through_ns
        in_time = start_ns + narrower.through_ns + after_ns <= queue.items[width][0]
        if coming and in_time and narrower.mostly_ns / width < lane_ns:
            best, lane_ns = Window(queue, narrower, 0, width), narrower.mostly_ns / width
    return best


def servable(level: Level) -> Iterator[Queue]:
    return (queue for _, _, queue in level.order if queue.costs.options and queue.ready())


def earliest(level: Level, start_ns: int, cap_ns: int) -> Window | None:
    """Earliest deadline first, in the width that costs the others least."""
    queue = next(servable(level), None)
    if queue is None:
        return None
    found = heads(queue, start_ns, cap_ns)
    if len(found) == 1:
        return found[0]
    lanes = found[-1].lanes
    return min(found, key=lambda w: lateness(w, level, start_ns) + lanes * w.option.l50_ns / w.lanes)


def heads(queue: Queue, start_ns: int, cap_ns: int) -> list[Window]:
    """Runs from the head that let it be in time, narrowest first; the narrowest one in any case."""
    waiting = queue.ready()
    cap_ns = cap_ns // 4 if queue.lot else cap_ns
    left_ns = queue.items[0][0] - start_ns
    found: list[Window] = []
    for option in queue.costs.options:
        if found and (option.through_ns > left_ns or not is_short(option, cap_ns)):
            break
        found.append(made(Window, (queue, option, 0, min(option.width, waiting))))
        if option.width >= waiting:
            break
    return found


def lateness(window: Window, level: Level, start_ns: int) -> int:
    """By how much what else was promised would be late after it."""
    queue, option, _, end = window
    if level.demand.is_feasible(start_ns + option.l50_ns):
        return 0
    after_ns = queue.costs.lane_after_ns
    done: dict[int, int] = {}
    for _, _, lane in queue.items[:end]:
        done[lane.bucket] = done.get(lane.bucket, 0) + lane.charge_ns - after_ns
    if end == len(queue.items):
        done[queue.head_bucket] += queue.head_ns
    return level.demand.lateness(done, start_ns + option.l50_ns)


def best_head(queue: Queue, start_ns: int, cap_ns: int) -> Window:
    return min(heads(queue, start_ns, cap_ns), key=lambda w: w.option.l50_ns / w.lanes)


def best_window(queue: Queue, start_ns: int, cap_ns: int, worth: Callable[[Item], float]) -> Window | None:
    """From anywhere, such that its first lane is in time: the most worth a second."""
    best, best_rate = None, 0.0
    ready = queue.ready()
    for at, option in enumerate(queue.costs.options):
        if at and not is_short(option, cap_ns):
            break
        first = bisect_left(queue.items, (start_ns + option.through_ns,))
        window = Window(queue, option, first, min(first + min(option.width, ready), len(queue.items)))
        if not window.lanes:
            break
        rate = total(map(worth, queue.items[first : window.end])) / option.through_ns
        if rate > best_rate:
            best, best_rate = window, rate
    return best


def total(worths: Iterable[float]) -> float:
    return sum(worths)
