"""In which runs so many lanes of one place are done soonest, and what a run may be where there is less time.

    widths 8 (3 ms) and 16 (4 ms): 20 lanes are done soonest by 16 and then 8, 24 as well, 25 by 16 and 16

The widest run of them goes first. What is asked for again and again is worked out once, up to twice the widest.
"""

from __future__ import annotations

from itertools import pairwise, takewhile
from math import hypot
from typing import NamedTuple

FAR = 1 << 62


class Option(NamedTuple):
    width: int
    executable: int
    l50_ns: int
    l99_ns: int
    through_ns: int  # from here to the end of its lanes, if they stay together: the l99, and the l50 of what follows
    mostly_ns: int  # the l50 of all of it
    slip_ns: int  # the difference


class Sums:
    """Of runs, by how many lanes they are for: how long they take, and which one is the first; as far as asked for."""

    __slots__ = ("mostly", "ascends", "times", "firsts", "untils", "_at", "_narrower")

    def __init__(self, mostly: list[tuple[int, int]], before: Sums | None = None) -> None:
        """What `before` knows of the narrowest runs, as far as they are the same, is known."""
        self.mostly: list[tuple[int, int]] = mostly  # width and time, the narrowest first
        self.ascends = all([ns < wider_ns for (_, ns), (_, wider_ns) in pairwise(mostly)])  # a wider one takes longer
        alike = takewhile(lambda both: both[0] == both[1], zip(mostly, before.mostly, strict=False) if before else ())
        upto = max([width for (width, _), _ in alike], default=0)
        self.times: list[int] = before.times[: upto + 1] if before else [0]
        self.firsts: list[int] = before.firsts[: upto + 1] if before else [0]  # numbers; of none the narrowest
        self.untils: dict[int, int] = {}
        self._at = 0  # the narrowest that has places for one more
        self._narrower: list[tuple[int, int, int]] = []  # with their numbers, the widest first

    def extend(self, lanes: int) -> None:
        """Of runs that are as good the widest goes first. Where a wider one takes longer, one run that is soonest for
        some lanes is so for more, as far as it has places."""
        times, firsts, mostly, at = self.times, self.firsts, self.mostly, self._at
        while (n := len(times)) <= lanes:
            while at < len(mostly) and mostly[at][0] < n:
                self._narrower.insert(0, (at, *mostly[at]))
                at = self._at = at + 1
            upto, one_ns = mostly[at] if at < len(mostly) else (n, FAR)
            best, best_ns = at, one_ns
            for number, width, ns in self._narrower:
                ns += times[n - width]
                if ns < best_ns:
                    best, best_ns = number, ns
            alike = upto - n + 1 if best == at and self.ascends else 1
            times += [best_ns] * alike
            firsts += [best] * alike

    def until(self, lanes: int, most: int) -> int:
        """Up to how many lanes the first run is the same one; FAR if up to `most`."""
        if lanes >= len(self.firsts):
            self.extend(lanes)
        firsts, upto = self.firsts, lanes
        while upto < most:
            if upto + 1 == len(firsts):
                self.extend(upto + 1)
            if firsts[upto + 1] != firsts[lanes]:
                break
            upto += 1
        known = FAR if upto == most else upto
        self.untils.update(dict.fromkeys(range(lanes, upto + 1), known))
        return known


class Cover:
    __slots__ = ("options", "widest", "ascends", "_most", "_sums", "_times", "_firsts", "_wider")

    def __init__(self, options: tuple[Option, ...], before: Cover | None = None) -> None:
        """`before`: another one, perhaps of the same times; what was worked out for it is not worked out again."""
        self.options = options
        self.widest = options[-1].width if options else 1
        self._most = 2 * options[-1].width if options else 0
        mostly = [(width, ns) for width, _, _, _, _, ns, _ in options]
        self._wider: dict[int, tuple[Option, ...]] = {}
        known = before._sums if before is not None else None
        sums = known if known is not None and known.mostly == mostly else Sums(mostly, known)
        self._sums: Sums = sums
        self._times, self._firsts, self.ascends = sums.times, sums.firsts, sums.ascends

    def first(self, lanes: int) -> Option:
        """The run to begin with."""
        firsts = self._firsts
        if lanes >= len(firsts):
            lanes = lanes if lanes < self._most else self._most
            if lanes >= len(firsts):
                self._sums.extend(lanes)
        return self.options[firsts[lanes]]

    def until(self, lanes: int) -> int:
        """Up to how many lanes this stays so."""
        if lanes >= self._most:
            return FAR
        known = self._sums.untils.get(lanes)
        return known if known is not None else self._sums.until(lanes, self._most)

    def wider(self, width: int) -> tuple[Option, ...]:
        """All that are wider, the narrowest first."""
        found = self._wider.get(width)
        if found is None:
            found = self._wider[width] = tuple([o for o in self.options if o.width > width])
        return found

    def within(self, left_ns: int, lanes: int, slip_ns: float | None = None) -> Option:
        """The one to begin with of those that are done in time; the narrowest where none is. With `slip_ns`, by how
        much they may begin later, they and that may take longer than they mostly do."""
        best, best_ns = self.options[0], FAR
        for option in self.options:
            slips_ns = 0.0 if slip_ns is None else hypot(option.slip_ns, slip_ns)
            if option.mostly_ns + slips_ns > left_ns:
                break
            ns = option.mostly_ns + self._time(lanes - option.width)
            if ns <= best_ns:
                best, best_ns = option, ns
            if option.width >= lanes:
                break
        return best

    def _time(self, lanes: int) -> int:
        """Of all runs."""
        if lanes <= 0:
            return 0
        if lanes > self._most:
            return self._time(self._most) * lanes // self._most
        if lanes >= len(self._firsts):
            self._sums.extend(lanes)
        return self._times[lanes]


NOTHING = Cover(())
