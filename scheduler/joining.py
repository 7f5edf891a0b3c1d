"""What is better run with a window, or before it.

catch up    lanes of an earlier segment go first, so that both take the segments that are left together
await       lanes on the device that go on with their next segment
mix         an executable of several families, where all of them wait, takes less than one run after another
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from coalesce.scheduler.catalog import Executable
from coalesce.scheduler.choice import best_head, Window
from coalesce.scheduler.costs import Costs, FAR
from coalesce.scheduler.flight import Bundle
from coalesce.scheduler.lanes import Queue
from coalesce.scheduler.queues import Queues
from coalesce.scheduler.tuples import made


class Part(NamedTuple):
    queue: Queue
    first: int
    end: int
    width: int


class Run(NamedTuple):
    executable: int
    parts: tuple[Part, ...]
    l50_ns: int
    l99_ns: int
    latest_ns: int  # start with which the first lane of its first part is in time
    why: str


def join(window: Window, queues: Queues, costs: Costs, start_ns: int) -> Run:
    behind = catch_up(window, queues, start_ns)
    if behind is not None:
        return alone(behind, "catch up")
    return mix(window, queues, costs, start_ns) or alone(window, "")


def alone(window: Window, why: str) -> Run:
    queue, option, first, end = window
    width, executable, l50_ns, l99_ns, _, _, _ = option
    part = made(Part, (queue, first, end, width))
    why = why or ("window" if first else "deadline")
    return made(Run, (executable, (part,), l50_ns, l99_ns, window.latest_ns, why))


def catch_up(window: Window, queues: Queues, start_ns: int) -> Window | None:
    """Lanes of the segment before, if the window can wait for them and one run of all is less than two."""
    family, segment = window.queue.place
    if not segment or window.first:
        return None
    before = queues.beside(window.queue, (family, segment - 1))
    if before is None or not before.costs.options or not before.ready():
        return None
    late = best_head(before, start_ns, FAR)
    both = window.lanes + late.lanes
    shared = next((o for o in window.queue.costs.options if o.width >= both), None)
    apart = next((o for o in window.queue.costs.options if o.width >= late.lanes), None)
    if shared is None or apart is None or shared.l50_ns >= window.option.l50_ns + apart.l50_ns:
        return None
    done_ns = start_ns + late.option.l99_ns + shared.through_ns
    return late if done_ns + late.option.l99_ns <= window.queue.items[0][0] else None


def is_awaited(run: Run, flying: Iterable[Bundle], costs: Costs, start_ns: int) -> bool:
    """Whether lanes on the device are due before this run and would be late after it, or are better run together with
    it."""
    part = run.parts[0]
    due_ns = part.queue.items[part.first][0]
    end_ns = start_ns + due_ns - run.latest_ns
    for bundle in flying:
        for (family, segment), lanes in bundle.parts:
            ahead_ns = costs.of((family, segment + 1)).through(len(lanes))
            own_ns = lanes[0].request.deadline_ns
            if ahead_ns and own_ns <= due_ns and own_ns - ahead_ns < end_ns:
                return True
            if ahead_ns and (family, segment + 1) == part.queue.place and meets(run, len(lanes), start_ns):
                return True
    return False


def meets(run: Run, coming: int, start_ns: int) -> bool:
    """Whether a run is better made with lanes that come to the same place when the device is free, and can be."""
    part = run.parts[0]
    both = part.end - part.first + coming
    options = part.queue.costs.options
    shared = next((o for o in options if o.width >= both), None)
    apart = next((o for o in options if o.width >= coming), None)
    if shared is None or apart is None or part.first or part.queue.lot or shared.l50_ns >= run.l50_ns + apart.l50_ns:
        return False
    return start_ns + shared.through_ns <= part.queue.items[0][0]


def mix(window: Window, queues: Queues, costs: Costs, start_ns: int) -> Run | None:
    """The executable that saves most beside runs one after another, with all its heads in time."""
    mixed = costs.mixed_at(window.queue.place)
    if not mixed or window.first or window.queue.lot:
        return None
    best, saved_ns = None, 0
    for executable in mixed:
        parts = waiting_for(executable, window, queues)
        if not parts or not in_time(executable, parts, start_ns):
            continue
        saves_ns = sum(time_apart(part) for part in parts) - costs.latency.of(executable.id).l50_ns
        if saves_ns > saved_ns:
            best, saved_ns = (executable, parts), saves_ns
    if best is None:
        return None
    executable, parts = best
    l50, l99 = costs.latency.of(executable.id)
    return Run(executable.id, parts, l50, l99, window.latest_ns, "mixed")


def waiting_for(executable: Executable, window: Window, queues: Queues) -> tuple[Part, ...]:
    """A part of each entry, in their order; none where an entry would stay empty."""
    parts = []
    for entry in executable.entries:
        queue = queues.beside(window.queue, (entry.family, entry.segment))
        ready = queue.ready() if queue is not None else 0
        if queue is None or not ready or not queue.costs.options:
            return ()
        parts.append(Part(queue, 0, min(entry.width, ready), entry.width))
    return tuple(parts)


def in_time(executable: Executable, parts: tuple[Part, ...], start_ns: int) -> bool:
    end_ns = start_ns + executable.l99_ns
    return all(end_ns + after(part) <= part.queue.items[0][0] for part in parts)


def after(part: Part) -> int:
    """What its lanes have ahead then."""
    costs = part.queue.costs
    return next((o.through_ns - o.l99_ns for o in costs.options if o.width >= part.end), costs.alone.l99_ns)


def time_apart(part: Part) -> int:
    """What the lanes of a part take in the narrowest executable of their own, or their share of the widest."""
    for option in part.queue.costs.options:
        if option.width >= part.end:
            return option.l50_ns
    widest = part.queue.costs.options[-1]
    return widest.l50_ns * part.end // widest.width
