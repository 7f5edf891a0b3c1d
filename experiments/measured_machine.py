"""What a real runtime took, for the simulator: its host by its log, its device by its bundles.

Times come again when they were, and in their order: slow moments of a machine last for more than one event, and slow
down all of it. Of several stretches that were learnt from, as before and after what is simulated, each has its turn for
BLOCK_NS: a machine that is slower in one of them is so half of the time.

    event   told     answered                told     ...
      | wake  |  busy: decides, dispatches... |

Between an event and its being told lies the waking up of the driver's thread, if that had nothing to do; what came
while it was busy says how long it was. With the rest it was busy as long as usual, and what was slow there shows in the
waking up: every slow moment of a log counts once, and comes again no more often than it came. Beside a bundle that runs
on the same cores it takes longer to wake up, but not much longer than the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, pairwise
from random import Random
from statistics import median
from typing import NamedTuple, TypeVar

from coalesce.scheduler.catalog import Entry, Executable
from coalesce.scheduler.commands import Command, Dispatch, WakeAt
from coalesce.scheduler.events import Completed, Event, Submitted, Timer
from coalesce.scheduler.machine import quantiles
from coalesce.scheduler.run import Decision, Outcome, Run

K = TypeVar("K")
NEVER = 1 << 62
BLOCK_NS = 250_000_000


class Moment(NamedTuple):
    at_ns: int  # since its stretch began
    took_ns: int


class Stretches:
    """Times of one kind of thing, of one stretch or several."""

    def __init__(self, stretches: Iterable[Iterable[Moment]]) -> None:
        ordered = (sorted(moments, key=lambda moment: moment.at_ns) for moments in stretches)
        self.stretches = [moments for moments in ordered if moments]
        self._block, self._own = -1, iter(())
        self._others = cycle([moment for moments in self.stretches for moment in moments])

    def __bool__(self) -> bool:
        return bool(self.stretches)

    def take(self, now_ns: int) -> int:
        """What it takes now: as in the stretch whose turn it is, then, one after the other; once these have been used
        up, as at other times, so that what was rare is not more often."""
        block = now_ns // BLOCK_NS
        if block != self._block:
            own = self.stretches[block % len(self.stretches)]
            self._block = block
            self._own = iter([moment for moment in own if moment.at_ns // BLOCK_NS == block])
        moment = next(self._own, None)
        return (moment if moment is not None else next(self._others)).took_ns

    @property
    def times_ns(self) -> list[int]:
        return [moment.took_ns for moments in self.stretches for moment in moments]


class Woken(NamedTuple):
    """What the driver's thread is woken up by, and beside what."""

    ended: bool  # a bundle
    busy: bool  # the device


class MeasuredHost:
    """`wakes` by whether a bundle had ended and whether another one ran, `busy` by whether something was dispatched;
    `now_ns` is read at a time."""

    def __init__(
        self, wakes: Mapping[Woken, Stretches], busy: Mapping[bool, Stretches], now_ns: Callable[[], int]
    ) -> None:
        self.wakes, self.busy, self._now_ns = wakes, busy, now_ns

    def wake(self, ended: bool, busy_ns: int) -> int:
        """As it was with the device as busy as now. Whoever waits for a core has one when the device is done."""
        busy = busy_ns > 0
        took_ns = self._of(self.wakes[Woken(ended, busy)] or self.wakes[Woken(ended, not busy)])
        idle = self.wakes[Woken(True, False)]
        return min(took_ns, busy_ns + self._of(idle)) if idle and 0 < busy_ns < took_ns else took_ns

    def decide(self, event: Event, commands: Sequence[Command]) -> int:
        return self._of(self.busy[dispatches(commands)])

    def bring(self, command: Dispatch) -> int:
        """Part of what it is busy with."""
        return 0

    def dispatch(self) -> int:
        """Part of the run, as the runtime counts."""
        return 0

    def tell(self) -> int:
        """Until the driver wakes up."""
        return 0

    def hand_out(self, command: Dispatch) -> int:
        """What is in time is known by when the device was done."""
        return 0

    def _of(self, times: Stretches) -> int:
        return times.take(self._now_ns()) if times else 0


def dispatches(commands: Sequence[Command]) -> bool:
    return any(isinstance(command, Dispatch) for command in commands)


def host_of(logs: Iterable[Sequence[Decision]], now_ns: Callable[[], int] = lambda: 0) -> MeasuredHost:
    """Of some stretches of a log; `now_ns` says what time it is in the simulation."""
    logs = list(logs)
    usual_ns = usually_busy(logs)
    wakes: list[list[tuple[Woken, Moment]]] = []
    busy: list[list[tuple[bool, Moment]]] = []
    for log in logs:
        woken, worked = list[tuple[Woken, Moment]](), list[tuple[bool, Moment]]()
        ends_ns = {event.bundle: event.end_ns for event, _, _ in log if isinstance(event, Completed)}
        free_ns = 0  # when the device was done with all that it had
        for before, after, later in zip(log, log[1:], [*log[2:], None], strict=False):
            for bundle in (c.bundle for c in before.commands if isinstance(c, Dispatch)):
                free_ns = ends_ns.get(bundle, NEVER)
            since_ns, ended = woken_ns(before, after, later)
            kind, at_ns = dispatches(before.commands), before.now_ns - log[0].now_ns
            done_ns = before.now_ns + usual_ns[kind]
            if since_ns <= done_ns:
                worked.append((kind, Moment(at_ns, after.now_ns - before.now_ns)))
                continue
            worked.append((kind, Moment(at_ns, usual_ns[kind])))
            if since_ns < NEVER:
                moment = Moment(since_ns - log[0].now_ns, after.now_ns - since_ns)
                woken.append((Woken(ended, free_ns > since_ns), moment))
        wakes.append(woken)
        busy.append(worked)
    whole = Stretches([moment for _, moment in found] for found in busy)
    waking = by_kind(wakes, [Woken(ended, works) for ended in (False, True) for works in (False, True)])
    return MeasuredHost(waking, {k: own or whole for k, own in by_kind(busy, (False, True)).items()}, now_ns)


def usually_busy(logs: Iterable[Sequence[Decision]]) -> dict[bool, int]:
    """By what was there already when it was told of the event before."""
    known: dict[bool, list[int]] = {False: [], True: []}
    for log in logs:
        for before, after in pairwise(log):
            if happened_ns(after.event, before.commands) <= before.now_ns:
                known[dispatches(before.commands)].append(after.now_ns - before.now_ns)
    whole = [*known[True], *known[False], 0]
    return {kind: int(median(own or whole)) for kind, own in known.items()}


def by_kind(stretches: Sequence[Sequence[tuple[K, Moment]]], kinds: Iterable[K]) -> dict[K, Stretches]:
    return {kind: Stretches([moment for own, moment in found if own == kind] for found in stretches) for kind in kinds}


def woken_ns(before: Decision, after: Decision, later: Decision | None) -> tuple[int, bool]:
    """When the driver could have been told, and whether a bundle's end was the reason; requests that were told after
    one may have come before it."""
    since_ns, event = happened_ns(after.event, before.commands), after.event
    if isinstance(event, Completed) and event.followed and later is not None:
        came_ns = happened_ns(later.event, ())
        return min(since_ns, came_ns), since_ns <= came_ns
    return since_ns, isinstance(event, Completed)


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
    at_ns: int = 0  # when it began, since its stretch did


class MeasuredDevice:
    """A watcher of a simulation that says how long its bundles take, and knows which requests were in time. What did
    not run in these stretches takes what it took in `others`; `disturbed` says how much longer it takes by when it
    begins and what it takes by itself."""

    def __init__(
        self,
        stretches: Iterable[Iterable[Ran]],
        others: Iterable[Iterable[Ran]] = (),
        disturbed: Callable[[int, int], int] = lambda begin_ns, took_ns: 0,
    ) -> None:
        self._times, self._others, self._disturbed = by_form(stretches), by_form(others), disturbed
        self.now_ns = self._free_ns = 0
        self._lanes: dict[int, list[int]] = {}
        self._ends_ns: dict[int, int] = {}

    def see(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        self.now_ns = now_ns
        if isinstance(event, Completed):
            self._ends_ns.update(dict.fromkeys(self._lanes.pop(event.bundle), event.end_ns))
        for command in commands:
            if isinstance(command, Dispatch):
                self._lanes[command.bundle] = [request for lanes in command.lanes for request in lanes]

    def takes(self, executable: Executable, rng: Random) -> int:
        """One that ran nowhere takes what its warm-up said."""
        form, waits, now_ns = executable.entries, self._free_ns > self.now_ns, self.now_ns
        asked = ((times, own) for times in (self._times, self._others) for own in (waits, not waits))
        known = next((times[form, own] for times, own in asked if (form, own) in times), None)
        took_ns = known.take(now_ns) if known is not None else quantiles(executable, rng)
        begin_ns = max(self._free_ns, now_ns)
        took_ns += self._disturbed(begin_ns, took_ns)
        self._free_ns = begin_ns + took_ns
        return took_ns

    def in_time(self, run: Run) -> int:
        """Requests, as the real runtime counts: by when the device was done, not by when anybody knew."""
        pairs = zip(run.requests, run.outcomes, strict=True)
        ended = [own for own, how in pairs if how in (Outcome.OK, Outcome.LATE)]
        return sum(self._ends_ns[own.id] <= own.deadline_ns for own in ended)


def by_form(stretches: Iterable[Iterable[Ran]]) -> dict[tuple[tuple[Entry, ...], bool], Stretches]:
    """What each executable took, and whether it had waited."""
    found: dict[tuple[tuple[Entry, ...], bool], dict[int, list[Moment]]] = {}
    for number, own in enumerate(stretches):
        for form, waited, took_ns, at_ns in own:
            found.setdefault((form, waited), {}).setdefault(number, []).append(Moment(at_ns, took_ns))
    return {key: Stretches(parts.values()) for key, parts in found.items()}
