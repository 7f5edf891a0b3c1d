"""The last runs of one executable, and what they say of the next one.

The median is theirs; the l99 is that of a normal distribution with their median and their l90. So one or two runs that
took very long say nothing of the next ones, and after a step half of WINDOW runs tell. While there are fewer runs, they
spread at least as in the warm-up, but by no more than MOST_SPREAD: the slowest of few runs may have been a hiccup.

A run that takes more than SLOW times its l99 says something of its tenants (`quarantine`), not yet of its executable:
it is held back, and counts only when HELD of them came in a row and no tenant was in all of them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import NamedTuple

from coalesce.scheduler.catalog import Executable

WINDOW = 24
SLOW = 2
HELD = 4
TENTH = 10  # of the runs take longer than the l90
TAIL = 1.8  # times as far from the median as it is the l99
MOST_SPREAD = 1.5  # l99 / l50


class Quantiles(NamedTuple):
    l50_ns: int
    l99_ns: int


class Runs:
    """The last runs of one executable, in their order and in order of their times."""

    __slots__ = ("last", "ascending", "held")

    def __init__(self) -> None:
        self.last: deque[int] = deque()
        self.ascending: list[int] = []
        self.held: list[tuple[int, frozenset[str]]] = []

    def add(self, time_ns: int, l99_ns: int, tenants: frozenset[str] | None) -> bool:
        """False where it is held back."""
        if time_ns <= SLOW * l99_ns:
            self.held.clear()
            self.count(time_ns)
            return True
        if tenants is None:
            return False
        self.held = [*self.held[-WINDOW:], (time_ns, tenants)]
        if len(self.held) < HELD or frozenset.intersection(*(who for _, who in self.held)):
            return False
        for held_ns, _ in self.held:
            self.count(held_ns)
        self.held.clear()
        return True

    def keep(self, count: int) -> None:
        """The last ones alone."""
        self.last = deque(list(self.last)[-count:])
        self.ascending = sorted(self.last)

    def count(self, time_ns: int) -> None:
        self.last.append(time_ns)
        insort(self.ascending, time_ns)
        if len(self.last) > WINDOW:
            del self.ascending[bisect_left(self.ascending, self.last.popleft())]

    def quantiles(self, prior: Executable) -> Quantiles:
        l50_ns = max(1, self.ascending[len(self.ascending) // 2])
        l90_ns = max(l50_ns, self.ascending[-1 - len(self.ascending) // TENTH])
        l99_ns = l50_ns + int(TAIL * (l90_ns - l50_ns))
        if len(self.last) == WINDOW:
            return Quantiles(l50_ns, l99_ns)
        return Quantiles(l50_ns, max(l99_ns, int(l50_ns * spread_of(prior))))


def spread_of(prior: Executable) -> float:
    """l99 / l50, as far as a warm-up says."""
    return min(MOST_SPREAD, prior.l99_ns / max(1, prior.l50_ns))
