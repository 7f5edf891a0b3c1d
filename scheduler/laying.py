"""Lays the runs of an outlook, one after the other.

At every turn it is the queue's whose head is due first. A turn is kept with what it was laid upon, so that one more
request is laid from the first turn that it changes: mostly it comes last, and most of what was laid stays.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection
from math import hypot
from typing import NamedTuple

from coalesce.scheduler.costs import FAR
from coalesce.scheduler.cover import Cover, Option
from coalesce.scheduler.hopes import hoped, Pace, pace_of
from coalesce.scheduler.lanes import Level, Queue

CALM = 0.3  # of what may go wrong once in a hundred times: once in four


class Begun(NamedTuple):
    """Lanes on the device that have more segments ahead, in a run of these together."""

    due_ns: int
    option: Option


class Start(NamedTuple):
    """When the device begins with what waits."""

    free_ns: int  # it is done with what it has
    begun: tuple[Begun, ...] = ()
    slip_ns: float = 0.0  # by how much it may be later
    is_calm: bool = False  # less is asked of it than it can do
    is_idle: bool = False  # it has nothing
    gap_ns: int = 0  # that passes between two runs
    spared: float = 0.0  # so much of the least SLO of its family is kept for each head (`promises`)
    patience_ns: int = 0  # of families where that is no longer

    def spare_ns(self, slo_ns: int) -> float:
        """What is kept for each head of a family, whose least SLO it is."""
        return self.spared * slo_ns if slo_ns <= self.patience_ns else 0.0


class Newcomer(NamedTuple):
    """A request that may come to a queue."""

    queue: Queue
    due_ns: int
    at: int  # behind so many of its queue
    is_owed: bool = True  # it has not had more than its share, of what others are refused


# A run, and what it was laid upon. It is a tuple without names, as hundreds are made for one that is dispatched:
#   due_ns, serial  of its head, and of its queue
#   queue           None for lanes that have begun
#   served          of the queue, before it
#   waiting         of the queue, that are not
#   option
#   is_whole        no narrower than with more time
#   is_pressed      there is little
#   start_ns
#   slip_ns         by how much that may be later
#   tardy_ns        before it
Turn = tuple[int, int, Queue | None, int, int, Option, bool, bool, int, float, float]

# What of a queue is to be laid yet, in order of the first two:
#   due_ns, serial  of its head, and of the queue
#   queue
#   served, count   so many, of so many
#   at              where the newcomer is in them, or FAR
#   whole           the run to begin with
#   taken           lanes that are hoped for in the runs so far
#   pace            how fast they come, where they are hoped for
Waiting = tuple[int, int, Queue | None, int, int, int, Option, int, Pace | None]


class Outlook:
    __slots__ = ("start", "turns", "late", "tardy_ns", "hurried", "end_ns", "slip_ns")

    def __init__(self, start: Start) -> None:
        self.start = start
        self.turns: list[Turn] = []
        self.late = 0  # lanes for which even the narrowest run is too long: they are in no turn
        self.tardy_ns = 0.0
        self.hurried: Collection[int] = ()  # queues, by serial
        self.end_ns = start.free_ns
        self.slip_ns = start.slip_ns  # by how much that may be later

    @property
    def first(self) -> tuple[Queue, Option, int] | None:
        """The next run of lanes that wait, and when it starts."""
        for _, _, queue, _, _, option, _, _, start_ns, _, _ in self.turns:
            if queue is not None:
                return queue, option, start_ns
        return None

    def bears(self, queue: Queue, other: Outlook) -> bool:
        """Whether one more of a queue makes nothing worse, with whom it is as in `other`."""
        return other.tardy_ns <= self.tardy_ns and queue.serial not in other.hurried

    def is_good(self, queue: Queue) -> bool:
        """Whether nothing is bad in it, whatever it was without one more of a queue."""
        return not self.tardy_ns and queue.serial not in self.hurried


def laid(level: Level, start: Start, new: Newcomer | None, now_ns: int, hope: bool) -> Outlook:
    """The outlook of one level."""
    found = Outlook(start)
    waits: list[Waiting] = [(due_ns, -i, None, 0, 0, FAR, run, 0, None) for i, (due_ns, run) in enumerate(start.begun)]
    kinds = len(level.firsts) if hope else 0
    newcomer = new.queue if new is not None else None
    for _, _, queue in level.order:
        if queue.costs.options:
            if queue is newcomer or kinds == 1:  # how many come to the only one has more reasons to change
                waits.append(waiting_in(queue, 0, new if queue is newcomer else None, kinds))
            else:
                waits.append(beginning_of(queue, kinds))
    if newcomer is not None and not newcomer.items:
        waits.append(waiting_in(newcomer, 0, new, kinds))
    lay(found, waits, new, now_ns, hope)
    return found


def with_one_more(sure: Outlook, new: Newcomer, now_ns: int) -> Outlook:
    """An outlook in which nobody is late or hurried, with a newcomer."""
    turns = sure.turns
    at, served = first_changed(turns, new)
    found = Outlook(sure.start)
    found.end_ns, found.slip_ns, found.tardy_ns = sure.end_ns, sure.slip_ns, sure.tardy_ns
    found.turns = turns[:at]
    waits: list[Waiting] = []
    if at < len(turns):
        *_, found.end_ns, found.slip_ns, found.tardy_ns = turns[at]
        seen = {new.queue.serial}
        for due_ns, serial, queue, served_yet, _, option, _, _, _, _, _ in turns[at:]:
            if queue is None:
                waits.append((due_ns, serial, None, 0, 0, FAR, option, 0, None))
            elif serial not in seen:
                seen.add(serial)
                waits.append(waiting_in(queue, served_yet, None, 0) if served_yet else beginning_of(queue, 0))
    if served <= len(new.queue.items):
        waits.append(waiting_in(new.queue, served, new, 0))
    lay(found, waits, new, now_ns, False)
    return found


def first_changed(turns: list[Turn], new: Newcomer) -> tuple[int, int]:
    """The first turn that is another one with a newcomer, and how many of its queue are served before it. Some may have
    come to that queue since the turns were laid."""
    own, due_ns, at, _ = new
    count, served, rank = len(own.items) + 1, 0, (due_ns, own.serial)
    first = own.costs.cover.first
    for i, (turn_ns, serial, queue, _, _, option, _, is_pressed, _, _, _) in enumerate(turns):
        if queue is own:
            if served >= at or is_pressed or first(count - served) is not option:
                return i, served
            served += option.width
            served = served if served < count else count
        elif served == at and rank < (turn_ns, serial):
            return i, served
    return len(turns), served


def beginning_of(queue: Queue, kinds: int) -> Waiting:
    """All that waits in a queue, as it was last where nothing has changed."""
    known = queue.hopes if kinds else queue.waits
    if known is None:
        known = waiting_in(queue, 0, None, kinds)
        if kinds:
            queue.hopes = known
        else:
            queue.waits = known
    return known


def waiting_in(queue: Queue, served: int, new: Newcomer | None, kinds: int) -> Waiting:
    """With a newcomer if it is its queue. `kinds`, of queues that runs of other lanes come from, is given where others
    are hoped for."""
    costs, items = queue.costs, queue.items
    count, at = len(items), FAR
    if new is not None:
        count, at = count + 1, new.at
    due_ns = items[served][0] if served < at else due_at(queue, new, at, served)
    pace = pace_of(queue, kinds) if kinds and not queue.place[1] and not queue.lot else None
    whole = costs.cover.first(count - served)
    return due_ns, queue.serial, queue, served, count, at, whole, 0, pace


def due_at(queue: Queue, new: Newcomer | None, at: int, number: int) -> int:
    """When one is due, counted with the newcomer and no sooner than it."""
    assert new is not None, f"lane {number} of {len(queue.items)}, and no newcomer at {at}"
    return new.due_ns if number == at else queue.items[number - 1][0]


def lay(found: Outlook, waits: list[Waiting], new: Newcomer | None, now_ns: int, hope: bool) -> None:
    """All that waits."""
    time_ns, slip_ns, tardy_ns, append = found.end_ns, found.slip_ns, found.tardy_ns, found.turns.append
    _, _, _, is_calm, _, gap_ns, spared, _ = found.start
    gaps_ns = 0
    risk = CALM if is_calm else 1.0
    lenient = hope or is_calm  # who is in time is, in whatever run
    all_hope = new is not None and not new.is_owed
    waits.sort()
    for i, (due_ns, serial, queue, served, count, at, whole, taken, pace) in enumerate(waits):
        width, _, _, _, _, mostly_ns, own_slip_ns = option = whole
        end_ns, later_ns = time_ns + mostly_ns, hypot(own_slip_ns, slip_ns)
        if queue is None:
            append((due_ns, serial, None, 0, 0, whole, True, False, time_ns, slip_ns, tardy_ns))
            time_ns, slip_ns = end_ns + gap_ns, later_ns
            continue
        if gap_ns:
            gaps_ns = gap_ns * (queue.costs.runs - 1)  # between its own segments
            end_ns += gaps_ns
        waiting, tardy_after_ns, is_given_up, is_pressed = count - served, tardy_ns, False, False
        is_sure = end_ns + later_ns <= due_ns
        if not is_sure and not queue.place[1]:  # lanes that have begun stay together
            is_pressed = True
            option = fitting(queue.costs.cover, whole, waiting, due_ns - time_ns, slip_ns)
            is_given_up = time_ns + option.mostly_ns > due_ns
            narrow = option is not whole and option.width < waiting and not is_given_up
            if narrow and is_calm and queue.costs.runs == 1:
                option = with_those_behind(option, queue, served, new, at, time_ns, due_ns)
        if pace is not None and not is_given_up:
            cover, until_ns = queue.costs.cover, time_ns - now_ns
            if all_hope or (served == at and not (is_calm and queue.rate.is_guess)):
                option, taken = hoped(cover, option, waiting, until_ns, taken, pace)
            else:
                option, taken = hoped(cover, option, waiting, until_ns, taken, pace, due_ns - time_ns, slip_ns, risk)
        if option is not whole:
            width, _, _, _, _, mostly_ns, own_slip_ns = option
            end_ns, later_ns, is_sure = time_ns + mostly_ns + gaps_ns, hypot(own_slip_ns, slip_ns), False
        spare_ns = found.start.spare_ns(queue.costs.slo_ns) if spared else 0.0
        if spare_ns or not is_sure:
            latest_ns = end_ns + risk * later_ns + spare_ns
            if latest_ns > due_ns:
                tardy_after_ns = tardy_ns + (latest_ns - due_ns)
            if end_ns > due_ns or (option is not whole and not lenient and is_inefficient(option, whole, waiting)):
                found.hurried = {serial, *found.hurried}
        if is_given_up:
            found.late += 1
            served += 1
        else:
            is_whole = option is whole
            append((due_ns, serial, queue, served, waiting, option, is_whole, is_pressed, time_ns, slip_ns, tardy_ns))
            time_ns, slip_ns = end_ns, later_ns
            if gap_ns:
                time_ns += gap_ns
            served += width
        tardy_ns = tardy_after_ns
        if served < count:
            whole = queue.costs.cover.first(count - served)
            due_ns = queue.items[served][0] if served < at else due_at(queue, new, at, served)
            insort(waits, (due_ns, serial, queue, served, count, at, whole, taken, pace), i + 1)
    found.end_ns, found.slip_ns, found.tardy_ns = time_ns, slip_ns, tardy_ns


def fitting(cover: Cover, whole: Option, waiting: int, left_ns: int, slip_ns: float) -> Option:
    """A narrower run: one that is in time whatever happens if that is about as efficient, or one that mostly is."""
    if whole.mostly_ns > left_ns:
        return cover.within(left_ns, waiting)
    sure = cover.within(left_ns, waiting, slip_ns)
    as_good = 10 * sure.mostly_ns * min(whole.width, waiting) <= 11 * whole.mostly_ns * min(sure.width, waiting)
    return sure if as_good else whole


def with_those_behind(
    narrow: Option, queue: Queue, served: int, new: Newcomer | None, at: int, time_ns: int, due_ns: int
) -> Option:
    """A narrow run, or a wider one that the head has time for as well, where those behind it could not be done in time
    in the run that does them soonest: that would be narrow for its own head, and so on."""
    cover, best, count = queue.costs.cover, narrow, len(queue.items) + (at != FAR)
    for option in (narrow, *cover.wider(narrow.width)):
        end_ns, behind = time_ns + option.mostly_ns, served + option.width
        if end_ns > due_ns:
            break
        best = option
        if behind >= count:
            break
        behind_ns = queue.items[behind][0] if behind < at else due_at(queue, new, at, behind)
        if end_ns + cover.first(count - behind).mostly_ns <= behind_ns:
            break
    return best


def is_inefficient(option: Option, whole: Option, waiting: int) -> bool:
    return 4 * option.mostly_ns * min(whole.width, waiting) > 5 * whole.mostly_ns * option.width
