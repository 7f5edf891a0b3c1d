"""What is to come: the runs that everything would be served in that waits, and what they leave for others.

    free_ns  [ queue a, 16 lanes ][ queue b, 9 lanes of 16 ][ queue a, 3 lanes of 4, hoped to be 14 of 16 ]

Runs are laid one after the other, the queue whose head is due first at every turn, in the runs that do its lanes
soonest (`laying`, `cover`). A run whose head would be late becomes narrower; it is *hurried* if it is late all the
same, or that makes it inefficient while more is asked of the device than it can do. Runs take as long as they mostly
do. By how much they may take longer adds up as errors do, and by how much heads would then be late makes an outlook
*tardy*: once in a hundred times where more is asked of the device than it can do, and once in four where it is not, and
who is refused for what might go wrong could have been served. The next run that is dispatched is the first one here.

A second outlook lays every run as wide as it is hoped to become until its turn (`hopes`), as far as heads that were
promised something can wait for it: whoever comes behind one that cannot makes nothing narrower than it is. So does a
newcomer whose run has no time to become that wide, but not where what is hoped for is a guess after a burst, and less
is asked of the device than it can do.

A request is taken on where neither becomes more tardy with it, and its own queue is not hurried. So it may come to a
run that is there anyway, which costs nothing; and it may begin one of its own where that has time to become as wide as
its kind becomes at this rate. At low rates that is a run of one lane. At high ones whoever would force narrow runs on
everybody is refused, and what is served is served in wide ones. What is promised is held against the first outlook
without what may go wrong, so that a run that took a little longer makes none of the next ones narrow.

Nothing is held against a level by those below it. What has been laid is remembered until something changes that was not
foreseen in it.
"""

from __future__ import annotations

from coalesce.scheduler.costs import FAR
from coalesce.scheduler.hopes import has_time, have_room
from coalesce.scheduler.lanes import Level, Queue
from coalesce.scheduler.laying import laid, Newcomer, Outlook, Start, with_one_more

FEW = 32  # runs


class Known:
    """What has been laid since something changed."""

    __slots__ = ("start", "sure", "hoped", "rooms", "closed", "is_loose")

    def __init__(self, start: Start, sure: Outlook | None = None, hoped: Outlook | None = None) -> None:
        self.start = start
        self.sure = sure
        self.hoped = hoped
        self.rooms: dict[int, tuple[int, int, bool]] = {}  # of queues, by serial: see `room`
        self.closed: dict[int, float] = {}  # until when whoever is due is refused, by the queue's serial
        self.is_loose = False  # some came to runs that may be others with them


def is_few(level: Level) -> bool:
    """Whether what waits is run in few enough runs to lay them at every turn."""
    if level.spare > 0:  # known since it was last asked
        return True
    ladder, runs = level.ladder, 0
    if ladder.crowded is not None and level.priority <= ladder.crowded:
        return False
    for own in ladder.waiting:
        if own.priority < level.priority:
            break
        runs += len(own.order)
        for _, _, queue in own.order if runs <= FEW else ():
            runs += len(queue.items) // queue.costs.cover.widest
        if runs > FEW:
            ladder.crowded = own.priority
            return False
    level.spare = (FEW - runs) // 2 + 1  # a lane is two more at most: that of its queue, and the one that it fills
    if not level.knows:
        ladder.learn(level)
    return True


def known(level: Level, start: Start, now_ns: int) -> Outlook:
    """As it was laid last, where nothing has changed since."""
    found = remembered(level, start)
    return found.sure or sure_of(found, level, start, now_ns)


def sure_of(found: Known, level: Level, start: Start, now_ns: int) -> Outlook:
    """Laid for the first time."""
    found.sure = outlook(level, start, now_ns)
    return found.sure


def known_hoped(level: Level, start: Start, now_ns: int) -> Outlook:
    found = remembered(level, start)
    if found.hoped is None:
        found.hoped = outlook(level, start, now_ns, hope=True)
    return found.hoped


def remembered(level: Level, start: Start) -> Known:
    found = level.outlook
    if found is None or (found.start is not start and found.start != start):
        found = level.outlook = Known(start)
        if not level.knows:
            level.ladder.learn(level)
    return found


def remember(found: Known, sure: Outlook, hoped: Outlook) -> None:
    """The newcomer of these has come."""
    found.sure, found.hoped, found.is_loose = sure, hoped, False
    found.rooms, found.closed = {}, {}


def outlook(level: Level, start: Start, now_ns: int, new: Newcomer | None = None, hope: bool = False) -> Outlook:
    """All of this level, after all of those above it."""
    for above in level.ladder.above(level):
        start = start._replace(free_ns=laid(above, start, None, now_ns, hope).end_ns, begun=())
    return laid(level, start, new, now_ns, hope)


def outlook_with(found: Known, level: Level, start: Start, now_ns: int, new: Newcomer) -> Outlook:
    """With one more, laid from where that makes a difference."""
    sure = found.sure or sure_of(found, level, start, now_ns)
    if sure.late or sure.hurried or found.is_loose:
        return outlook(level, start, now_ns, new)
    return with_one_more(sure, new, now_ns)


def close(found: Known, new: Newcomer, tardy_ns: float) -> bool:
    """One was refused that would make others, or be itself, late by so much: who comes behind it would too, unless it
    is due later by that."""
    if new.at == len(new.queue.items) and tardy_ns > 0:
        found.closed[new.queue.serial] = new.due_ns + tardy_ns
    return False


def is_closed(found: Known, new: Newcomer) -> bool:
    """Whether one was refused before it that is due as late."""
    queue, due_ns, at, _ = new
    return at >= len(queue.items) and due_ns < found.closed.get(queue.serial, 0.0)


def has_room(queue: Queue, due_ns: int, start: Start, now_ns: int) -> bool:
    """Whether one more, due last of its queue, comes to its last run, with everything else as it is."""
    found = queue.level.outlook
    if found is None or found.start is not start:
        found = remembered(queue.level, start)
    own = found.rooms.get(queue.serial)
    if own is None:
        sure = found.sure or sure_of(found, queue.level, start, now_ns)
        own = found.rooms[queue.serial] = room(sure, queue)
    most, end_ns, is_tight = own
    if len(queue.items) >= most or due_ns < end_ns:
        return False
    if is_tight:
        found.is_loose = True
    return True


def room(sure: Outlook, queue: Queue) -> tuple[int, int, bool]:
    """Up to how many lanes in a queue change none of its runs, when the last of these is done, and whether some of them
    have little time."""
    count, most, last, end_ns, is_tight = len(queue.items), FAR, 0, FAR, False
    for _, _, own, served, _, option, is_whole, is_pressed, start_ns, _, _ in reversed(sure.turns):
        if own is not queue:
            continue
        if not last:
            last, end_ns = served + option.width, start_ns + option.through_ns
        upto = served + queue.costs.cover.until(count - served) if is_whole else 0
        if upto < most:
            most = upto
        is_tight = is_tight or is_pressed
        if not served:  # it is the first of them
            break
    if not last or sure.late:
        return 0, FAR, False
    if sure.start.gap_ns:
        end_ns += sure.start.gap_ns * (queue.costs.runs - 1)
    return most if most < last else last, end_ns, is_tight


def hoped_with(found: Known, new: Newcomer) -> Outlook | None:
    """As it was laid last, if one more was hoped for in it: it takes one of the places that were kept."""
    queue, due_ns, at, _ = new
    hoped = found.hoped
    if hoped is None or hoped.late or queue.serial in hoped.hurried or at < len(queue.items):
        return None
    for _, _, own, served, _, option, _, _, start_ns, _, _ in reversed(hoped.turns):
        if own is queue:
            return hoped if at < served + option.width and due_ns >= start_ns + option.through_ns else None
    return None


def keeps_room(ahead: Outlook, level: Level, now_ns: int) -> bool:
    """Whether those who are owed something still find places in runs of their queues, or the time for one."""
    done_ns, kinds = ahead.end_ns + 2 * ahead.slip_ns, len(level.firsts)
    if kinds > FEW:
        return True
    for queue in level.firsts:
        if queue.others.until_ns > now_ns:
            runs = [(waiting, run, at) for _, _, own, _, waiting, run, _, _, at, _, _ in ahead.turns if own is queue]
            if not (have_room(queue, runs, done_ns, now_ns) if runs else has_time(queue, done_ns, now_ns, kinds)):
                return False
    return True
