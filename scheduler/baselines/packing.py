"""Plain EDF packing: the first by deadline, and with it as many of the next as it can wait for.

Nothing is dropped but what is hopeless. At overload that collapses: the head is nearly late, its batch is small, and
so is the next one's.
"""

from __future__ import annotations

from collections.abc import Sequence

from coalesce.scheduler.baselines.clockwork import batch
from coalesce.scheduler.baselines.desk import Desk, has_begun, Ready, Run, Wait
from coalesce.scheduler.baselines.menu import opens_ns
from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import Event
from coalesce.scheduler.latency import LatencyModel


class Packing:
    """`defer`: not before the latest moment at which the batch might still become wider."""

    def __init__(self, *, defer: bool = False, depth: int = 2, lead_ns: int = 200_000) -> None:
        self._desk = Desk(LatencyModel(), depth=depth, lead_ns=lead_ns)
        self._choose = run_latest if defer else run_now

    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        return self._desk.handle(event, now_ns, self._choose)


def run_now(ready: Sequence[Ready], start_ns: int) -> Run:
    return batch(min(ready, key=lambda r: r.queue.items[0][:2]), start_ns)


def run_latest(ready: Sequence[Ready], start_ns: int) -> Run | Wait:
    run = run_now(ready, start_ns)
    opens = opens_ns(run.ready.options, run.option, run.ready.head.deadline_ns)
    return run if opens <= start_ns or has_begun(run.ready) else Wait(opens)
