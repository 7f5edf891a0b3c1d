"""Where to cut a program into segments, and how often: arithmetic on times and live bytes alone.

A cut costs a call, and the values that are live there a way to memory and back. What it wins is that nobody waits for
longer than a segment: whoever comes while the program runs finds it, on average, with `sum(t * t) / (2 * sum(t))` to go
in the segment under way. Both are microseconds, and the cuts that are chosen have the least sum of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from coalesce.costs import Costs

MOST = 8  # segments, unless more are asked for
SHARE = 0.1  # of the program's time that cuts may cost
PLACES = 96  # that are looked at for a cut


class Point(NamedTuple):
    """A place where a program may be cut: before the equation `at`, with so many bytes live."""

    at: int
    live: int


class Demand(NamedTuple):
    segments: int | None  # so many, if there are places for it
    patience_us: float | None  # else, as few as leave none that takes longer
    slower: float = 1.0  # how many times as long as predicted the program takes, if it was measured


class Chosen(NamedTuple):
    cuts: tuple[int, ...]
    times_us: tuple[float, ...]  # of each segment
    why: str


def choose_cuts(times_us: Sequence[float], points: Sequence[Point], costs: Costs, demand: Demand) -> Chosen:
    table = Table([us * demand.slower for us in times_us], points, costs)
    whole = f"{milliseconds(table.total)} predicted"
    if not table.points:
        return Chosen((), (table.total,), f"not cut: there is no place for it ({whole})")
    if demand.segments is not None:
        chosen = table.best(min(demand.segments, len(table.points) + 1))
        return chosen._replace(why=f"as asked for: {chosen.why}" if chosen.cuts else f"not cut, as asked for ({whole})")
    if demand.patience_us is None or table.total <= demand.patience_us:
        waits = "nobody waits for it" if demand.patience_us is None else "the most urgent tenant can wait for it"
        return Chosen((), (table.total,), f"not cut: {waits} ({whole})")
    found = Chosen((), (table.total,), f"not cut: a call more costs too much beside it ({whole})")
    for segments in range(2, min(MOST, len(table.points) + 1) + 1):
        chosen = table.best(segments)
        if table.cost(chosen.cuts) > SHARE * table.total:
            break
        found = chosen
        if max(chosen.times_us) <= demand.patience_us:
            break
    return found


class Table:
    """The best cuts for each number of segments, by dynamic programming over the places."""

    def __init__(self, times_us: Sequence[float], points: Sequence[Point], costs: Costs) -> None:
        self.done = [0.0, *accumulate(times_us)]  # before each equation
        self.total = self.done[-1]
        self.costs = costs
        self.points = thinned(points, self.done)
        self.live = {point.at: point.live for point in points}
        # [j][m]: (least cost of everything before place m in j + 1 segments, the place of the cut before)
        self.rows: list[list[tuple[float, int]]] = []

    def cost(self, cuts: Sequence[int]) -> float:
        return sum(self.costs.call + self.costs.light(self.live[at], self.live[at], 2) for at in cuts)

    def best(self, segments: int) -> Chosen:
        ends = [*(p.at for p in self.points), len(self.done) - 1]
        if not self.rows:
            self.rows.append([(self.wait(0, at), -1) for at in ends])
        while len(self.rows) < segments:
            self.rows.append([self.extended(self.rows[-1], ends, m) for m in range(len(ends))])
        cuts: list[int] = []
        m = len(ends) - 1
        for row in reversed(self.rows[1:segments]):
            m = row[m][1]
            cuts.append(ends[m])
        cuts.reverse()
        bounds = [0, *cuts, len(self.done) - 1]
        times = tuple(self.done[b] - self.done[a] for a, b in zip(bounds, bounds[1:], strict=False))
        live = ", ".join(f"{self.live[at]:,}" for at in cuts)
        why = f"{len(times)} segments of {', '.join(map(milliseconds, times))} predicted, with {live} bytes live"
        return Chosen(tuple(cuts), times, why)

    def extended(self, row: Sequence[tuple[float, int]], ends: Sequence[int], m: int) -> tuple[float, int]:
        """One segment more, which ends at place m."""
        tried = [(row[i][0] + self.cost([ends[i]]) + self.wait(ends[i], ends[m]), i) for i in range(m)]
        return min(tried, default=(float("inf"), -1))

    def wait(self, first: int, end: int) -> float:
        """What a segment adds to the mean wait for the one under way."""
        return (self.done[end] - self.done[first]) ** 2 / (2 * self.total) if self.total else 0.0


def thinned(points: Sequence[Point], done: Sequence[float]) -> list[Point]:
    """At most PLACES of them: of those that lie near each other in time, the one with the least bytes live."""
    if len(points) <= PLACES:
        return list(points)
    best: dict[int, Point] = {}
    for point in points:
        place = int(PLACES * done[point.at] / done[-1]) if done[-1] else 0
        known = best.get(place)
        if known is None or point.live < known.live:
            best[place] = point
    return sorted(best.values())


def milliseconds(us: float) -> str:
    return f"{us / 1000:.3g} ms"
