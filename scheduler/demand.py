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


class Work:
    """Device time, by when it is due."""

    __slots__ = ("by_bucket", "added_ns", "changes")

    def __init__(self) -> None:
        self.by_bucket: dict[int, int] = {}
        self.added_ns = 0  # ever
        self.changes = 0

    def add(self, bucket: int, work_ns: int) -> None:
        self.by_bucket[bucket] = self.by_bucket.get(bucket, 0) + work_ns
        self.added_ns += work_ns
        self.changes += 1

    def remove(self, bucket: int, work_ns: int) -> None:
        if work_ns < 0:  # what was counted was too little
            self.add(bucket, -work_ns)
        elif work_ns:
            left_ns = self.by_bucket[bucket] - work_ns
            if left_ns:
                self.by_bucket[bucket] = left_ns
            else:  # it may be long until the next summing up
                del self.by_bucket[bucket]
            self.changes += 1

    def add_all(self, other: Work) -> None:
        for bucket, work_ns in other.by_bucket.items():
            self.add(bucket, work_ns)

    def remove_all(self, other: Work) -> None:
        for bucket, work_ns in other.by_bucket.items():
            self.remove(bucket, work_ns)


class Demand(Work):
    """What is promised, beside what is so elsewhere (`base`)."""

    __slots__ = ("base", "_buckets", "_before", "_latest", "_known_ns", "_known")

    def __init__(self, base: Work) -> None:
        super().__init__()
        self.base = base
        self._buckets: list[int] = []  # of the last summing up, ascending
        self._before: list[int] = [0]  # work due before each of them, and all of it
        self._latest: list[int] = [FAR]  # the least latest start over this bucket and all later ones
        self._known_ns = 0  # that had been added until then
        self._known = 0  # how many changes there had been

    def around(self, bucket: int) -> Around:
        """What is promised before one more that is due then, and how long all else can wait; at worst."""
        buckets, since_ns = self._buckets, self.added_ns + self.base.added_ns - self._known_ns
        at = bisect_left(buckets, bucket)
        ahead = at + 1 if at < len(buckets) and buckets[at] == bucket else at
        return made(Around, (self._before[ahead] + since_ns, self._latest[at] - since_ns))

    def is_feasible(self, start_ns: int) -> bool:
        if self._latest[0] - (self.added_ns + self.base.added_ns - self._known_ns) >= start_ns:
            return True
        return self.sum_up() and self._latest[0] >= start_ns

    def lateness(self, done: Mapping[int, int], start_ns: int) -> int:
        """By how much the latest of all would be late, if the device starts then and this part, by bucket, is done."""
        self.sum_up()
        done_ns, worst_ns, last_ns = 0, 0, 0
        for bucket, before_ns in zip(self._buckets, self._before[1:], strict=True):
            own_ns = done.get(bucket, 0)
            done_ns += own_ns
            late_ns = start_ns + before_ns - done_ns - bucket
            if late_ns > worst_ns and before_ns - last_ns > own_ns:
                worst_ns = late_ns
            last_ns = before_ns
        return worst_ns

    def put_on(self, base: Work) -> None:
        """With all that both have as before, but not where."""
        self.base, self._known = base, -1
        self.sum_up()

    def sum_up(self) -> bool:
        """Makes `around` exact; false where it is."""
        base, changes = self.base, self.changes + self.base.changes
        if changes == self._known:
            return False
        work = self.by_bucket = {bucket: work_ns for bucket, work_ns in sorted(self.by_bucket.items()) if work_ns}
        if base.by_bucket:
            both = dict(base.by_bucket)
            for bucket, work_ns in work.items():
                both[bucket] = both.get(bucket, 0) + work_ns
            work = {bucket: work_ns for bucket, work_ns in sorted(both.items()) if work_ns}
        self._buckets = list(work)
        done = list(accumulate(work.values()))
        self._before = [0, *done]
        starts = list(map(sub, self._buckets, done))
        starts.append(FAR)
        starts.reverse()
        self._latest = list(accumulate(starts, min))
        self._latest.reverse()
        self._known_ns, self._known = self.added_ns + base.added_ns, changes
        return True
