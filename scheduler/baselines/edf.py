"""Earliest deadline first, one request at a time, and nothing that would be late."""

from __future__ import annotations

from collections.abc import Sequence

from coalesce.scheduler.baselines.desk import by_deadline, Desk
from coalesce.scheduler.baselines.one_by_one import run_first
from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import Event
from coalesce.scheduler.latency import LatencyModel


class Edf:
    def __init__(self, *, depth: int = 2, lead_ns: int = 200_000) -> None:
        self._desk = Desk(LatencyModel(), by_deadline, wants=False, depth=depth, lead_ns=lead_ns)

    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        return self._desk.handle(event, now_ns, run_first)
