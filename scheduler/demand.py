"""The demand test: whether all that was promised can still be done in time, if the device starts at a given time.

Promised device time is summed by deadline. With the sums, the latest start for everything due at a deadline or before
is that deadline less the time before it, and the least of them over all later deadlines says how much more may come:

    due at            10    20    30        one that needs 4 by 20 is admitted if the device is free by 12:
    promised           2     3     9        10 - 2 = 8,  20 - 5 - 4 = 11,  30 - 14 - 4 = 12
    before, with it    2     5    14        the least of 11 and 12 counts; at 10 it changes nothing

Deadlines are rounded down to a grid that is fine where they are near (1/16 of what is left at submit), so that there
are few sums. What comes in between is assumed to be due at once, and only where the test then fails it is done anew.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate
from operator import sub
from typing import NamedTuple

from coalesce.scheduler.tuples import made

FAR = 1 << 62
GRID_BITS = 5  # of what is left until a deadline, that matter


def bucket_of(deadline_ns: int, now_ns: int) -> int:
    """The deadline, earlier by at most 1/16 of what is left until then."""
    bits = (deadline_ns - now_ns).bit_length() - GRID_BITS
    return deadline_ns & -(1 << bits) if bits > 0 else deadline_ns


class Around(NamedTuple):
    before_ns: int  # device time of what is due then or before
    latest_ns: int  # start of what is due then or later, with all that is due before


class Demand:
    __slots__ = ("_work", "_buckets", "_before", "_latest", "_since", "_stale")

    def __init__(self) -> None:
        self._work: dict[int, int] = {}  # bucket -> ns of device time
        self._buckets: list[int] = []  # of the last summing up, ascending
        self._before: list[int] = [0]  # work due before each of them, and all of it
        self._latest: list[int] = [FAR]  # the least latest start over this bucket and all later ones
        self._since = 0  # added since
        self._stale = False  # whether anything changed since

    def add(self, bucket: int, work_ns: int) -> None:
        self._work[bucket] = self._work.get(bucket, 0) + work_ns
        self._since += work_ns
        self._stale = True

    def remove(self, bucket: int, work_ns: int) -> None:
        if work_ns < 0:  # what was counted was too little
            self.add(bucket, -work_ns)
        elif work_ns:
            left_ns = self._work[bucket] - work_ns
            if left_ns:
                self._work[bucket] = left_ns
            else:  # it may be long until the next summing up
                del self._work[bucket]
            self._stale = True

    def around(self, bucket: int) -> Around:
        """What is promised before one more that is due then, and how long all else can wait; at worst."""
        buckets, since_ns = self._buckets, self._since
        at = bisect_left(buckets, bucket)
        ahead = at + 1 if at < len(buckets) and buckets[at] == bucket else at
        return made(Around, (self._before[ahead] + since_ns, self._latest[at] - since_ns))

    def is_feasible(self, start_ns: int) -> bool:
        if self._latest[0] - self._since >= start_ns:
            return True
        return self.sum_up() and self._latest[0] >= start_ns

    def lateness(self, done: Mapping[int, int], start_ns: int) -> int:
        """By how much the latest of all would be late, if the device starts then and this part, by bucket, is done."""
        self.sum_up()
        done_ns, worst_ns = 0, 0
        for bucket, before_ns in zip(self._buckets, self._before[1:], strict=True):
            own_ns = done.get(bucket, 0)
            done_ns += own_ns
            late_ns = start_ns + before_ns - done_ns - bucket
            if late_ns > worst_ns and self._work[bucket] > own_ns:
                worst_ns = late_ns
        return worst_ns

    def take_over(self, other: Demand) -> None:
        """Counts everything that another counts."""
        self._work = dict(other._work)
        self._stale = True

    def sum_up(self) -> bool:
        """Makes `around` exact; false where it is."""
        if not self._stale:
            return False
        self._work = {bucket: work for bucket, work in sorted(self._work.items()) if work}
        self._buckets = list(self._work)
        done = list(accumulate(self._work.values()))
        self._before = [0, *done]
        starts = list(map(sub, self._buckets, done))
        starts.append(FAR)
        starts.reverse()
        self._latest = list(accumulate(starts, min))
        self._latest.reverse()
        self._since = 0
        self._stale = False
        return True
