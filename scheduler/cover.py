"""In which runs so many lanes of one place are done soonest, and what a run may be where there is less time.

    widths 8 (3 ms) and 16 (4 ms): 20 lanes are done soonest by 16 and then 8, 24 as well, 25 by 16 and 16

The widest run of them goes first. What is asked for again and again is worked out once, up to twice the widest.
"""

from __future__ import annotations

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


class Cover:
    __slots__ = ("options", "widest", "_mostly", "_times", "_firsts", "_most", "_untils")

    def __init__(self, options: tuple[Option, ...], before: Cover | None = None) -> None:
        """`before`: another one, perhaps of the same times; what was worked out for it is not worked out again."""
        self.options = options
        self.widest = options[-1].width if options else 1
        self._most = 2 * options[-1].width if options else 0
        self._mostly = [(option.width, option.mostly_ns) for option in options]
        if before is not None and before._mostly == self._mostly:
            self._times, self._firsts, self._untils = before._times, before._firsts, before._untils
            return
        self._times = [0]
        self._firsts = [0]  # their numbers; for no lanes, which nobody asks for, the narrowest
        self._untils: dict[int, int] = {}

    def first(self, lanes: int) -> Option:
        """The run to begin with."""
        firsts = self._firsts
        if lanes >= len(firsts):
            lanes = lanes if lanes < self._most else self._most
            if lanes >= len(firsts):
                self._extend(lanes)
        return self.options[firsts[lanes]]

    def until(self, lanes: int) -> int:
        """Up to how many lanes this stays so."""
        if lanes >= self._most:
            return FAR
        known = self._untils.get(lanes)
        if known is None:
            option, upto = self.first(lanes), lanes
            while upto < self._most and self.first(upto + 1) is option:
                upto += 1
            known = FAR if upto == self._most else upto
            self._untils.update(dict.fromkeys(range(lanes, upto + 1), known))
        return known

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
            self._extend(lanes)
        return self._times[lanes]

    def _extend(self, lanes: int) -> None:
        times, firsts, runs = self._times, self._firsts, self._mostly
        for n in range(len(times), lanes + 1):
            best, best_ns, at = 0, FAR, 0
            for width, ns in runs:
                if width >= n:
                    if ns <= best_ns:
                        best, best_ns = at, ns
                    break
                ns += times[n - width]
                if ns <= best_ns:
                    best, best_ns = at, ns
                at += 1
            times.append(best_ns)
            firsts.append(best)


NOTHING = Cover(())
