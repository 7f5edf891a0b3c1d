"""After Clockwork: of all batches that can be in time the one that has to start first.

A queue's batch is the widest that its head, the first by deadline, can wait for, and its priority the latest start:
the deadline less what the batch is estimated to take. The least goes first. What could start too late even alone is
refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from coalesce.scheduler.baselines.desk import Desk, Ready, Run
from coalesce.scheduler.baselines.last_runs import LastRuns
from coalesce.scheduler.baselines.menu import most_lanes
from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import Event


class Clockwork:
    """`apart`: as published, where tenants' models share nothing; else lanes of a family share batches."""

    def __init__(self, *, apart: bool = False, depth: int = 2, lead_ns: int = 200_000) -> None:
        self._desk = Desk(LastRuns(), apart=apart, depth=depth, lead_ns=lead_ns)

    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        return self._desk.handle(event, now_ns, run_most_urgent)


def run_most_urgent(ready: Sequence[Ready], start_ns: int) -> Run:
    return min((batch(r, start_ns) for r in ready), key=latest_ns)


def batch(ready: Ready, start_ns: int) -> Run:
    """The widest that the head can wait for."""
    option = most_lanes(ready.options, ready.lanes, ready.head.deadline_ns - start_ns)
    return Run(ready, option, min(option.width, ready.lanes))


def latest_ns(run: Run) -> int:
    """The latest start with which its head is in time."""
    return run.ready.head.deadline_ns - run.option.through.l99_ns
