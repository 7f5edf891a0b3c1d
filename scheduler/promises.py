"""How well it is kept what was promised, and what of a request's time is kept back so that it is.

    arrival                            due
       [------- time for it -------|kept]    taken on if it can be done in that time, as far as anybody knows

What a request needed to be kept back is what was, and by how much it ended late, or less if it ended early. Of the
first lanes of the last MEMORY bundles, which are the most urgent of theirs, all but one in a hundred needed no more
than what is kept back now, whatever the reasons are: a host that hiccups, results that are late, runs that wait for
each other. So one or two hiccups move nothing, several in a short time keep back a fifth at most, and where there is
time to spare nothing is kept back.

OF_ALL of it, as a share of the least SLO of its family, is kept for the head of each run that is laid for a newcomer
(`laying`), while too much is asked for: else whoever comes later and is due sooner takes what was kept. The rest is
kept of the newcomer's time alone; one that allows less than its family keeps more of it.

It is kept back only where others would take the place: where somebody was there all the time, and more was asked of the
device than it can do, for PAST times as long as the request may take, but for moments of less than WHOLE_NS. Nobody is
refused for it who comes to a device that was idle a moment ago, or when a rush is over. Where tenants are suspected of
making runs slow (`quarantine`), promises are not kept for that, and it does not count.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from coalesce.scheduler.events import Completed
from coalesce.scheduler.lanes import Lane
from coalesce.scheduler.load import WHOLE_NS

MEMORY = 256  # bundles
RARELY = 100
MOST = 0.2
PAST = 4
OF_ALL = 0.5


class Promises:
    def __init__(self) -> None:
        self.since_ns = 0  # from when on somebody was there all the time, and there was too much to do
        self._over_ns = -WHOLE_NS  # when there was last
        self.share = 0.0  # that is kept back of the time of requests that come then
        self._counts = True
        self._last: deque[float] = deque()  # what was needed, or 0
        self._needed: list[float] = []  # of it what is more, ascending
        self._handed: tuple[Lane, int] | None = None  # the last lane whose run has ended, and when

    def note_load(self, is_over: bool, now_ns: int) -> None:
        """Whether more is asked of the device than it can do."""
        if is_over:
            self._over_ns = now_ns
        elif now_ns - self._over_ns >= WHOLE_NS:
            self.since_ns = now_ns

    def kept(self, due_ns: int, now_ns: int) -> float:
        """The share of the time of a request that comes now."""
        return self.share if self._counts and now_ns - self.since_ns >= PAST * (due_ns - now_ns) else 0.0

    def spared(self, now_ns: int) -> tuple[float, int]:
        """The share of the least SLO of each family that is kept of everybody's time, and how long that SLO may be: a
        PASTth of the time since then, which is WHOLE_NS at least."""
        past_ns = now_ns - self.since_ns
        if not self.share or not self._counts or past_ns < WHOLE_NS:
            return 0.0, 0
        return self.share * OF_ALL, past_ns // PAST

    def end(self, lane: Lane | None, event: Completed, suspects: bool) -> None:
        """A bundle has; with the first lane of those that are done, and whether anybody is suspected."""
        self._counts = not suspects
        if self._handed is not None:
            before, end_ns = self._handed
            self.note(before, end_ns + event.results_ns)
        self._handed = (lane, event.end_ns) if lane is not None else None

    def note(self, lane: Lane, end_ns: int) -> None:
        """Its client has results then, or would have."""
        if not self._counts:
            return
        _, _, _, arrival_ns, due_ns, _ = lane.request
        needed = (end_ns - due_ns) / max(1, due_ns - arrival_ns)
        if self.share:
            needed += self.kept(due_ns, arrival_ns)  # about what was kept back when it came
        last, above = self._last, self._needed
        last.append(needed if needed > 0 else 0.0)
        if needed > 0:
            insort(above, needed)
        if len(last) > MEMORY and (gone := last.popleft()):
            del above[bisect_left(above, gone)]
        rare = len(last) // RARELY
        self.share = min(MOST, above[-1 - rare]) if len(above) > rare else 0.0
