"""What it costs to take lanes through a place, a segment of a family, from the catalog and the latency model.

A family can be run once each of its segments has an executable. Then `options` are those of one segment, narrowest
first. What a request will cost is not known before its company is: the demand test takes its part of the widest run
that the deadlines of its family allow over and over (`lane_ns`), and for the first in a queue what is fixed in a run
(`first_ns`). Both count all segments that are still ahead, and so do `alone`: a single lane from here to its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from coalesce.scheduler.catalog import Catalog, Executable
from coalesce.scheduler.latency import LatencyModel, Quantiles

Place = tuple[int, int]  # family, segment
FAR = 1 << 62


class Option(NamedTuple):
    width: int
    executable: int
    l50_ns: int
    l99_ns: int
    through_ns: int  # l99 from here to the end of its lanes, if they stay together


@dataclass(frozen=True, slots=True)
class PlaceCosts:
    options: tuple[Option, ...] = ()
    alone: Quantiles = Quantiles(0, 0)
    lane_ns: int = 0
    lane_after_ns: int = 0  # of it, what comes after this segment
    first_ns: int = 0
    fixed_ns: int = 0  # of it, in this segment
    steady: int = 0  # which option it is that keeps up with requests for ever
    ahead_ns: int = 0  # what a queue's head needs: alone, or, once it has begun, with those that it is with

    def through(self, lanes: int) -> int:
        """Until so many lanes are done, if they stay together as far as it pays."""
        for option in self.options[: self.steady + 1]:
            if option.width >= lanes:
                return option.through_ns
        return self.options[self.steady].through_ns if self.options else 0

    def together(self, lanes: int) -> int:
        """Until the last of so many lanes is done, if they stay together as far as there are executables for it."""
        for option in self.options:
            if option.width >= lanes:
                return option.through_ns
        return -(-lanes // self.options[-1].width) * self.options[-1].through_ns if self.options else 0


UNSERVABLE = PlaceCosts()


class Costs:
    """Of all places; `factor` is for lanes that are known to be slow, in quarters."""

    def __init__(self, latency: LatencyModel):
        self.catalog = Catalog()
        self.latency = latency
        self._tightest_ns: Mapping[int, int] = {}
        self._mixed: dict[Place, list[Executable]] = {}
        self._known: dict[tuple[int, int, int], PlaceCosts] = {}

    def change(self, catalog: Catalog, tightest_ns: Mapping[int, int]) -> None:
        """`tightest_ns`: the least SLO of each family."""
        if catalog is not self.catalog:
            self._mixed = {}
            for executable in catalog.mixed:
                for entry in executable.entries:
                    self._mixed.setdefault(entry[:2], []).append(executable)
        self.catalog = catalog
        self._tightest_ns = tightest_ns
        self.forget()

    def mixed_at(self, place: Place) -> Sequence[Executable]:
        """What runs this place together with others."""
        return self._mixed.get(place, ())

    def forget(self) -> None:
        """Latencies have moved."""
        self._known.clear()

    def of(self, place: Place, factor: int = 4) -> PlaceCosts:
        key = (*place, factor)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._work_out(place, factor)
        return known

    def _work_out(self, place: Place, factor: int) -> PlaceCosts:
        family, segment = place
        executables = self.catalog.by_place.get(place, ())
        last = segment + 1 >= self.catalog.segments_of(family)  # more: the family has gone
        rest = UNSERVABLE if last else self.of((family, segment + 1), factor)
        if not executables or not (last or rest.options):
            return UNSERVABLE
        options = tuple(self._option(e, factor, rest) for e in executables)
        at = sustained(options, self._tightest_ns.get(family, FAR))
        first, steady = options[0], options[at]
        lane_ns = -(-steady.l50_ns // steady.width)
        fixed_ns = max(0, first.l50_ns - lane_ns)
        return PlaceCosts(
            options,
            Quantiles(first.l50_ns + rest.alone.l50_ns, first.l99_ns + rest.alone.l99_ns),
            lane_ns + rest.lane_ns,
            rest.lane_ns,
            fixed_ns + rest.first_ns,
            fixed_ns,
            at,
            steady.through_ns if segment else first.through_ns,
        )

    def _option(self, executable: Executable, factor: int, rest: PlaceCosts) -> Option:
        width = executable.entries[0].width
        l50_ns, l99_ns = (ns * factor // 4 for ns in self.latency.of(executable.id))
        return Option(width, executable.id, l50_ns, l99_ns, l99_ns + rest.together(width))


def sustained(options: Sequence[Option], slo_ns: int) -> int:
    """The most efficient one that requests can wait for, while it runs with others, and then run in themselves."""
    can = [at for at, o in enumerate(options) if 2 * o.through_ns <= slo_ns]
    return max(can, key=lambda at: options[at].width / options[at].l50_ns, default=0)
