"""What a real runtime took, for the simulator: its host by its log, its device by its bundles.

Times come again in their order, since slow moments of a machine last for more than one event.

    event   told     answered                told     ...
      | wake  |  busy: decides, dispatches... |

Between an event and its being told lies the waking up of the driver's thread, if that had nothing to do; what was there
already when it was told of the event before says how long it was busy with that. The rest says neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, cycle, pairwise
from random import Random
from statistics import median
from typing import NamedTuple

from coalesce.scheduler.catalog import Entry, Executable
from coalesce.scheduler.commands import Command, Dispatch, WakeAt
from coalesce.scheduler.events import Completed, Event, Submitted, Timer
from coalesce.scheduler.machine import quantiles
from coalesce.scheduler.run import Decision, Outcome, Run

NEVER = 1 << 62
SURE = 4  # times as long as it is mostly busy: after that it is idle


class MeasuredHost:
    """`wakes_ns` by whether a bundle had ended, `busy_ns` by whether something was dispatched."""

    def __init__(self, wakes_ns: dict[bool, Sequence[int]], busy_ns: dict[bool, Sequence[int]]) -> None:
        self.wakes_ns, self.busy_ns = wakes_ns, busy_ns
        self._wakes = {ended: endless(ns) for ended, ns in wakes_ns.items()}
        self._busy = {dispatched: endless(ns) for dispatched, ns in busy_ns.items()}

    def wake(self, ended: bool) -> int:
        return next(self._wakes[ended])

    def decide(self, commands: Sequence[Command]) -> int:
        return next(self._busy[dispatches(commands)])

    def dispatch(self) -> int:
        """Part of the run, as the runtime counts."""
        return 0

    def tell(self) -> int:
        """Until the driver wakes up."""
        return 0


def endless(times_ns: Sequence[int]) -> Iterator[int]:
    return cycle(times_ns or (0,))


def dispatches(commands: Sequence[Command]) -> bool:
    return any(isinstance(command, Dispatch) for command in commands)


def host_of(log: Iterable[Sequence[Decision]]) -> MeasuredHost:
    """Of some stretches of a log."""
    pairs = list(chain.from_iterable(map(pairwise, log)))
    busy: dict[bool, list[int]] = {False: [], True: []}
    for before, after in pairs:
        if happened_ns(after.event, before.commands) <= before.now_ns:
            busy[dispatches(before.commands)].append(after.now_ns - before.now_ns)
    known = [*busy[False], *busy[True]]
    idle_ns = SURE * int(median(known)) if known else 0
    wakes: dict[bool, list[int]] = {False: [], True: []}
    for before, after in pairs:
        since_ns = happened_ns(after.event, before.commands)
        if before.now_ns + idle_ns < since_ns < NEVER:
            wakes[isinstance(after.event, Completed)].append(after.now_ns - since_ns)
    return MeasuredHost({**wakes}, {kind: own or known for kind, own in busy.items()})


def happened_ns(event: Event, asked: Sequence[Command]) -> int:
    """When the driver could have been told; after all times if nothing says."""
    if isinstance(event, Submitted):
        return event.requests[0].arrival_ns
    if isinstance(event, Completed):
        return event.end_ns
    if isinstance(event, Timer):
        return next((c.time_ns for c in asked if isinstance(c, WakeAt)), NEVER)
    return NEVER


class Ran(NamedTuple):
    """A bundle that left the device."""

    form: tuple[Entry, ...]  # of its executable
    waited: bool  # behind another bundle, so that its time is without what the host takes to dispatch
    took_ns: int


class MeasuredDevice:
    """A watcher of a simulation that says how long its bundles take, and knows which requests were in time."""

    def __init__(self, ran: Iterable[Ran]) -> None:
        times: dict[tuple[tuple[Entry, ...], bool], list[int]] = {}
        for form, waited, took_ns in ran:
            times.setdefault((form, waited), []).append(took_ns)
        self._times: Mapping[tuple[tuple[Entry, ...], bool], Iterator[int]] = {k: cycle(v) for k, v in times.items()}
        self._now_ns = self._free_ns = 0
        self._lanes: dict[int, list[int]] = {}
        self._ends_ns: dict[int, int] = {}

    def see(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        self._now_ns = now_ns
        if isinstance(event, Completed):
            self._ends_ns.update(dict.fromkeys(self._lanes.pop(event.bundle), event.end_ns))
        for command in commands:
            if isinstance(command, Dispatch):
                self._lanes[command.bundle] = [request for lanes in command.lanes for request in lanes]

    def takes(self, executable: Executable, rng: Random) -> int:
        """One that did not run takes what its warm-up said."""
        waits = self._free_ns > self._now_ns
        known = self._times.get((executable.entries, waits)) or self._times.get((executable.entries, not waits))
        took_ns = next(known) if known is not None else quantiles(executable, rng)
        self._free_ns = max(self._free_ns, self._now_ns) + took_ns
        return took_ns

    def in_time(self, run: Run) -> int:
        """Requests, as the real runtime counts: by when the device was done, not by when anybody knew."""
        pairs = zip(run.requests, run.outcomes, strict=True)
        ended = [own for own, how in pairs if how in (Outcome.OK, Outcome.LATE)]
        return sum(self._ends_ns[own.id] <= own.deadline_ns for own in ended)
