"""A policy as a log of the real driver leaves it, which goes on in a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command, Dispatch, WakeAt
from coalesce.scheduler.events import Completed, Event, Submitted
from coalesce.scheduler.run import Decision


class Later:
    """A policy on another clock, which starts at 0 when its own is at `start_ns`."""

    def __init__(self, policy: Coalescing, start_ns: int) -> None:
        self._policy, self._start_ns = policy, start_ns

    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        commands = self._policy.on_event(self._moved(event), self._start_ns + now_ns)
        return [c._replace(time_ns=c.time_ns - self._start_ns) if isinstance(c, WakeAt) else c for c in commands]

    def _moved(self, event: Event) -> Event:
        by = self._start_ns
        if isinstance(event, Submitted):
            moved = (r._replace(arrival_ns=r.arrival_ns + by, deadline_ns=r.deadline_ns + by) for r in event.requests)
            return Submitted(tuple(moved))
        if isinstance(event, Completed):
            return event._replace(start_ns=event.start_ns + by, end_ns=event.end_ns + by)
        return event


class Following:
    """A policy that is told a log bit by bit; its bundles are counted from 0, those of the log on from others'."""

    def __init__(self, log: Sequence[Decision]) -> None:
        self._policy, self._log, self._told = Coalescing(), log, 0
        self._before = next((c.bundle for _, _, commands in log for c in commands if isinstance(c, Dispatch)), 0)

    def later(self, start_ns: int) -> Later:
        """What goes on after all that was told before that time; times never go back from call to call."""
        log, on_event = self._log, self._policy.on_event
        while self._told < len(log) and log[self._told].now_ns < start_ns:
            event, now_ns, _ = log[self._told]
            own = event._replace(bundle=event.bundle - self._before) if isinstance(event, Completed) else event
            on_event(own, now_ns)
            self._told += 1
        return Later(deepcopy(self._policy), start_ns)
