"""What it costs to take lanes through a place, a segment of a family, from the catalog and the latency model.

A family can be run once each of its segments has an executable. Then `options` are those of one segment, narrowest
first. What a request will cost is not known before its company is: the demand test takes its part of the widest run
that the deadlines of its family allow over and over (`lane_ns`), and for the first in a queue what is fixed in a run
(`first_ns`). Both count all segments that are still ahead, and so do `alone`: a single lane from here to its end.
"""

from __future__ import annotations

from bisect import bisect_left
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


@dataclass(frozen=True, slots=True)
class PlaceCosts:
    options: tuple[Option, ...] = ()
    alone: Quantiles = Quantiles(0, 0)
    after: Quantiles = Quantiles(0, 0)  # of it, what comes after this segment
    lane_ns: int = 0
    lane_after_ns: int = 0
    first_ns: int = 0
    fixed_ns: int = 0  # of it, in this segment
    widths: tuple[int, ...] = ()
    through_ns: tuple[int, ...] = ()  # l99 of lanes in such a width, from here to their end

    def through(self, lanes: int) -> int:
        """Until the last of so many lanes is done, if they stay together as far as it pays."""
        at = bisect_left(self.widths, lanes)
        return self.through_ns[min(at, len(self.through_ns) - 1)] if self.through_ns else 0


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
        options = tuple(self._option(e, factor) for e in executables)
        through = tuple(o.l99_ns + (0 if last else rest.through(o.width)) for o in options)
        steady = sustained(options, through, self._tightest_ns.get(family, FAR))
        first = options[0]
        lane_ns = -(-steady.l50_ns // steady.width)
        fixed_ns = max(0, first.l50_ns - lane_ns)
        return PlaceCosts(
            options,
            Quantiles(first.l50_ns + rest.alone.l50_ns, first.l99_ns + rest.alone.l99_ns),
            rest.alone,
            lane_ns + rest.lane_ns,
            rest.lane_ns,
            fixed_ns + rest.first_ns,
            fixed_ns,
            tuple(o.width for o in options if o.width <= steady.width),
            tuple(t for o, t in zip(options, through, strict=True) if o.width <= steady.width),
        )

    def _option(self, executable: Executable, factor: int) -> Option:
        l50, l99 = self.latency.of(executable.id)
        return Option(executable.entries[0].width, executable.id, l50 * factor // 4, l99 * factor // 4)


def sustained(options: Sequence[Option], through_ns: Sequence[int], slo_ns: int) -> Option:
    """The most efficient one that requests can wait for, while it runs with others, and then run in themselves."""
    can = [o for o, through in zip(options, through_ns, strict=True) if 2 * through <= slo_ns]
    return max(can, key=lambda o: o.width / o.l50_ns, default=options[0])
