"""Which run is next: the window rule.

As long as everything that was promised can be done, the queue whose head has the least latest start goes first, from
its head, in the width that does most lanes a second and lets its head, and the head of the queue after it, be in time.
Otherwise that would collapse: the head that is nearly late forces ever smaller runs. Then the best run may start
anywhere in a queue's lanes by deadline, and those in front of it are left for later, or to be late.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from coalesce.scheduler.costs import Option
from coalesce.scheduler.queues import Item, Level, Queue

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
        return self.queue.items[self.first][0] - self.option.l99_ns - self.queue.costs.after.l99_ns


def choose(level: Level, start_ns: int, cap_ns: int, worth: Callable[[Item], float]) -> Window | None:
    if level.demand.is_feasible(start_ns):
        return earliest(level, start_ns, cap_ns)
    found = [w for q in islice(servable(level), CANDIDATES) if (w := best_window(q, start_ns, cap_ns, worth))]
    return min(found, key=lambda w: (w.latest_ns, w.option.l99_ns / w.lanes), default=None)


def servable(level: Level) -> Iterator[Queue]:
    return (queue for _, _, queue in level.order if queue.costs.options and queue.ready())


def earliest(level: Level, start_ns: int, cap_ns: int) -> Window | None:
    """Earliest deadline first."""
    ahead = servable(level)
    queue = next(ahead, None)
    if queue is None:
        return None
    after = next(ahead, None)
    free = best_head(queue, start_ns, cap_ns)
    if after is None or after.rank is None or start_ns + free.option.l99_ns <= after.rank[0]:
        return free
    polite = best_head(queue, start_ns, min(cap_ns, after.rank[0] - start_ns))
    return polite if 2 * polite.lanes * free.option.l50_ns >= free.lanes * polite.option.l50_ns else free


def best_head(queue: Queue, start_ns: int, longest_ns: int) -> Window:
    """From the head, the narrowest run at least."""
    waiting = queue.ready()
    in_time_ns = min(longest_ns, queue.items[0][0] - queue.costs.after.l99_ns - start_ns)
    best, best_lanes = queue.costs.options[0], 1
    for option in queue.costs.options:
        if option.l99_ns > in_time_ns:
            break
        lanes = min(option.width, waiting)
        if lanes * best.l50_ns >= best_lanes * option.l50_ns:
            best, best_lanes = option, lanes
        if option.width >= waiting:
            break
    return Window(queue, best, 0, min(best.width, waiting))


def best_window(queue: Queue, start_ns: int, cap_ns: int, worth: Callable[[Item], float]) -> Window | None:
    """From anywhere, such that its first lane is in time: the most worth a second."""
    best, best_rate = None, 0.0
    ready = queue.ready()
    for at, option in enumerate(queue.costs.options):
        if at and option.l99_ns > cap_ns:
            break
        first = bisect_left(queue.items, (start_ns + option.l99_ns + queue.costs.after.l99_ns,))
        window = Window(queue, option, first, min(first + min(option.width, ready), len(queue.items)))
        if not window.lanes:
            break
        rate = total(map(worth, queue.items[first : window.end])) / option.l99_ns
        if rate > best_rate:
            best, best_rate = window, rate
    return best


def total(worths: Iterable[float]) -> float:
    return sum(worths)
