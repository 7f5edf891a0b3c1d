"""After Symphony: batches are deferred until waiting for another lane would make their head late.

With a head due at d and a run of b lanes in l(b), a batch may start within [d - l(b'), d - l(b)], where b' is the next
wider executable: before, it might still become that wide; after, its head is late. Of those whose window is open, the
one whose window closes first goes. Where the head allows a narrow batch only, and a later one would make a wider batch
of what waits, those in front of it are dropped, but not to get wider than a steady flow of requests would be served.
"""

from __future__ import annotations

from collections.abc import Sequence

from coalesce.scheduler.baselines.clockwork import batch, latest_ns
from coalesce.scheduler.baselines.desk import Desk, Drop, has_begun, Ready, Run, Wait
from coalesce.scheduler.baselines.menu import most_lanes, opens_ns
from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import Event
from coalesce.scheduler.latency import LatencyModel
from coalesce.scheduler.request import Request


class Symphony:
    """`apart`: as published, where tenants' models share nothing; else lanes of a family share batches."""

    def __init__(self, *, apart: bool = False, depth: int = 2, lead_ns: int = 200_000) -> None:
        self._desk = Desk(LatencyModel(), apart=apart, depth=depth, lead_ns=lead_ns)

    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        return self._desk.handle(event, now_ns, run_in_window)


def run_in_window(ready: Sequence[Ready], start_ns: int) -> Run | Drop | Wait:
    open_now: list[Run] = []
    opening_ns: list[int] = []
    for own in ready:
        run = batch(own, start_ns)
        late = too_small(run, start_ns)
        if late:
            return Drop(own, late)
        opens = opens_ns(own.options, run.option, own.head.deadline_ns)
        if opens <= start_ns or has_begun(own):
            open_now.append(run)
        else:
            opening_ns.append(opens)
    return min(open_now, key=latest_ns) if open_now else Wait(min(opening_ns))


def too_small(run: Run, start_ns: int) -> int:
    """How many lanes at the front force a batch that is smaller than it need be; of those that have not begun."""
    ready, _, lanes, _ = run
    if has_begun(ready) or lanes == ready.lanes:
        return 0
    best, first, head = lanes, 0, ready.head
    for at, (deadline_ns, _, lane) in enumerate(ready.queue.items[: ready.lanes]):
        waiting = ready.lanes - at
        if waiting <= best:
            break
        option = most_lanes(ready.options, waiting, deadline_ns - start_ns)
        if min(option.width, waiting) > best:
            best, first, head = min(option.width, waiting), at, lane.request
    return first if lanes < steady_width(ready, head) else 0


def steady_width(ready: Ready, request: Request) -> int:
    """The widest that a flow of such requests can be served in: each waits for one run, and then for its own."""
    allowed_ns = request.deadline_ns - request.arrival_ns
    return max((o.width for o in ready.options if 2 * o.through.l99_ns <= allowed_ns), default=1)
