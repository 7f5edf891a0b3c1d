"""The levels there are: added when a priority is asked for first, and forgotten when nobody has it any more.

What a level counts is everything that was promised of its priority and above. Who takes the time for a priority, or a
score, has as many levels as requests, and each request would count in all levels below its own. So levels stand in
bands of at most BAND, highest first:

    base                 levels
    nothing              1000 999 ... 971     a level has what was promised in it and in those above it in its band;
    all of the first      970 969 ... 941     where that is summed up, its base is added
    all of both           940 939 ...

A request counts in the levels that are left of its band, and in the bases of the bands below. A band that is full
becomes two; those that have become small are put together again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container

from coalesce.scheduler.demand import Work
from coalesce.scheduler.lanes import downwards, Ladder, Level

BAND = 32


class Band:
    __slots__ = ("levels", "base", "below")

    def __init__(self, levels: list[Level], base: Work) -> None:
        self.levels = levels  # highest first, never none
        self.base = base  # what is promised above all of them
        self.below: list[Work] = []  # the bases of the bands below it

    def count(self) -> None:
        """Each of its levels counts in itself and those below it."""
        demands = tuple([level.demand for level in self.levels])
        for at, level in enumerate(self.levels):
            level.counted, level.below = demands[at:], self.below

    def rebase(self, base: Work) -> None:
        self.base = base
        for level in self.levels:
            level.demand.put_on(base)


class Levels:
    def __init__(self) -> None:
        self.all: list[Level] = []  # highest priority first
        self.ladder = Ladder()
        self._by_priority: dict[int, Level] = {}
        self._bands: list[Band] = []

    def get(self, priority: int) -> Level:
        known = self._by_priority.get(priority)
        return known if known is not None else self._add(priority)

    def keep(self, busy: Container[int]) -> None:
        """Forgets the priorities that nobody has any more: nothing is promised in them."""
        self.all[:] = [level for level in self.all if level.priority in busy]
        self._by_priority = {level.priority: level for level in self.all}
        self.ladder.top = self.all[0] if self.all else None
        self.ladder.forget()
        for band in self._bands:
            band.levels = [level for level in band.levels if level.priority in busy]
        self._put_together()

    def _add(self, priority: int) -> Level:
        """What was promised above it counts in it."""
        if not self._bands:
            self._bands.append(Band([], Work()))
        number = max(0, bisect_left(self._bands, -priority, lo=1, key=highest) - 1)
        band = self._bands[number]
        level = self._by_priority[priority] = Level(priority, self.ladder, band.base)
        at = bisect_left(band.levels, -priority, key=downwards)
        if at:
            level.demand.add_all(band.levels[at - 1].demand)
        band.levels.insert(at, level)
        band.count()
        self.all.insert(bisect_left(self.all, -priority, key=downwards), level)
        self.ladder.top = self.all[0]
        self.ladder.forget()
        if len(band.levels) > BAND:
            self._part(number)
        return level

    def _part(self, number: int) -> None:
        upper = self._bands[number]
        half = len(upper.levels) // 2
        lower = Band(upper.levels[half:], Work())
        upper.levels = upper.levels[:half]
        above = upper.levels[-1].demand
        lower.base.add_all(upper.base)
        lower.base.add_all(above)
        for level in lower.levels:
            level.demand.remove_all(above)
        lower.rebase(lower.base)
        upper.count()
        lower.count()
        self._bands.insert(number + 1, lower)
        self._pass_on()

    def _put_together(self) -> None:
        """Those that have become small, and none that is empty."""
        old, self._bands = self._bands, []
        for band in old:
            upper = self._bands[-1] if self._bands else None
            if not band.levels:
                continue
            if upper is None or len(upper.levels) + len(band.levels) > BAND // 2:
                self._bands.append(band)
                continue
            above = upper.levels[-1].demand
            for level in band.levels:
                level.demand.add_all(above)
            band.rebase(upper.base)
            upper.levels += band.levels
        for band in self._bands:
            band.count()
        self._pass_on()

    def _pass_on(self) -> None:
        """Each band counts in the bases of those below it; the lists are those that their levels have."""
        bases = [band.base for band in self._bands]
        for at, band in enumerate(self._bands):
            band.below[:] = bases[at + 1 :]


def highest(band: Band) -> int:
    return downwards(band.levels[0])
