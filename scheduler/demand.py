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
from itertools import accumulate
from operator import sub

FAR = 1 << 62


def bucket_of(deadline_ns: int, now_ns: int) -> int:
    """The deadline, earlier by at most 1/16 of what is left until then."""
    return deadline_ns & -(1 << max(0, (deadline_ns - now_ns).bit_length() - 5))


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
        self._work[bucket] -= work_ns
        self._stale = True

    def fits(self, bucket: int, own_ns: int, work_ns: int, start_ns: int) -> bool:
        """Whether one more is in time `own_ns` after what is due before it, and delays nobody too much by `work_ns`."""
        if self._latest_start(bucket, own_ns, work_ns) - self._since >= start_ns:
            return True
        return self._sum_up() and self._latest_start(bucket, own_ns, work_ns) >= start_ns

    def is_feasible(self, start_ns: int) -> bool:
        if self._latest[0] - self._since >= start_ns:
            return True
        return self._sum_up() and self._latest[0] >= start_ns

    def take_over(self, other: Demand) -> None:
        """Counts everything that another counts."""
        self._work = dict(other._work)
        self._stale = True

    def _latest_start(self, bucket: int, own_ns: int, work_ns: int) -> int:
        buckets = self._buckets
        at = bisect_left(buckets, bucket)
        ahead = at + 1 if at < len(buckets) and buckets[at] == bucket else at
        return min(bucket - self._before[ahead] - own_ns, self._latest[at] - work_ns)

    def _sum_up(self) -> bool:
        """False where nothing has changed since the last time."""
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
