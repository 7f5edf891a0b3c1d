"""How long the host takes with what it is told at once, by how much that is.

    told     1      2      4      8      12
    takes    460    460    530    620    770      microseconds until it brings a bundle, on the host of an H200

Most of that is there once, whatever it is told: threads wake up, and the policy is asked. So the last bundles are put
into groups that were decided upon about as much, and what is between these lies on straight lines; what is beyond them
on the line from the first to the last, such as what a pause brings at once. Where there is one group, less takes its
part, and more as much. Each group counts by the middle of its times, which is an average, since they are paid over and
over.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise

LAST = 32  # bundles
FEW = 8  # of them, in a group


class Told:
    def __init__(self) -> None:
        self.bundles = 0  # that were learnt from
        self._last: deque[tuple[int, int]] = deque(maxlen=LAST)
        self._points: list[tuple[int, int]] = []  # how much, and what it takes, both ascending

    def learn(self, told: int, ns: int) -> None:
        self.bundles += 1
        self._last.append((told, ns))
        if self.bundles < FEW:
            return
        least_ns, points = 0, []
        for group in groups_of(sorted(self._last)):
            least_ns = max(least_ns, middle_of(sorted([ns for _, ns in group]), 4))
            points.append((sum([told for told, _ in group]) // len(group), least_ns))
        self._points = points

    def takes(self, told: int) -> int:
        """0 as long as little is known."""
        points = self._points
        if not points:
            return 0
        (first, first_ns), (last, last_ns) = points[0], points[-1]
        if first < told < last:
            (before, before_ns), (after, after_ns) = next((a, b) for a, b in pairwise(points) if told <= b[0])
            return before_ns + (told - before) * (after_ns - before_ns) // (after - before)
        beyond_ns = last_ns + (told - last) * (last_ns - first_ns) // max(1, last - first)
        return beyond_ns if told >= last else max(first_ns * told // first, beyond_ns if first < last else 0)


def groups_of(ascending: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Those of one number of bits together, and with those of more where they are FEW."""
    groups: list[list[tuple[int, int]]] = [[]]
    bits = 0
    for told, ns in ascending:
        if told.bit_length() > bits and len(groups[-1]) >= FEW:
            groups.append([])
        bits = told.bit_length()
        groups[-1].append((told, ns))
    if len(groups) > 1 and len(groups[-1]) < FEW:
        few = groups.pop()
        groups[-1] += few
    return groups


def middle_of(ascending: list[int], part: int) -> int:
    """Its mean without the least and the largest, one `part` of it each."""
    cut = len(ascending) // part
    middle = ascending[cut : len(ascending) - cut]
    return sum(middle) // len(middle)
