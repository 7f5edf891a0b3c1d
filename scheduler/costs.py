"""What it costs to take lanes through a place, a segment of a family, from the catalog and the latency model.

A family can be run once each of its segments has an executable. Then `options` are those of one segment, narrowest
first. What a request will cost is not known before its company is: the demand test takes its part of the widest run
that the deadlines of its family allow over and over (`lane_ns`), and for the first in a queue what is fixed in a run
(`first_ns`). Both count all segments that are still ahead, and so do `alone`: a single lane from here to its end.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import hypot

from coalesce.scheduler.catalog import Catalog, Executable
from coalesce.scheduler.cover import Cover, FAR, NOTHING, Option
from coalesce.scheduler.latency import LatencyModel
from coalesce.scheduler.times import Quantiles
from coalesce.scheduler.tuples import made

Place = tuple[int, int]  # family, segment
AS_OTHERS = 4  # quarters: the factor of lanes that are not known to be slow
MARKEDLY = 8  # a run that is faster by one part in so many is: less may be chance


@dataclass(frozen=True, slots=True)
class PlaceCosts:
    options: tuple[Option, ...] = ()
    alone: Quantiles = Quantiles(0, 0)
    lane_ns: int = 0
    lane_after_ns: int = 0  # of it, what comes after this segment
    first_ns: int = 0
    fixed_ns: int = 0  # of it, in this segment
    steady: int = 0  # which option it is that can be run over and over
    slo_ns: int = FAR  # the least of the family's
    widths: tuple[int, ...] = ()  # up to it
    ahead_ns: int = 0  # what a queue's head needs: alone, or, once it has begun, with those that it is with
    cover: Cover = NOTHING
    runs: int = 1  # from here to the end

    def through(self, lanes: int) -> int:
        """Until so many lanes are done, if they stay together as far as it pays."""
        return self.options[min(self.steady, bisect_left(self.widths, lanes))].through_ns if self.options else 0

    def filled(self, lanes: int) -> int:
        """As long as the widest run that so many lanes fill, as far as it pays."""
        return self.options[max(0, bisect_right(self.widths, lanes) - 1)].through_ns


UNSERVABLE = PlaceCosts()


class Costs:
    """Of all places; `factor` is for lanes that are known to be slow, in quarters."""

    def __init__(self, latency: LatencyModel):
        self.catalog = Catalog()
        self.latency = latency
        self.cap_ns = FAR  # no run of more than one lane is longer
        self._tightest_ns: Mapping[int, int] = {}
        self._mixed: dict[Place, list[Executable]] = {}
        self._known: dict[tuple[int, int], tuple[PlaceCosts, ...]] = {}
        self._covers: dict[Place, Cover] = {}  # as they were last

    def change(self, catalog: Catalog, tightest_ns: Mapping[int, int]) -> None:
        """`tightest_ns`: the least SLO of each family."""
        if catalog is not self.catalog:
            self._mixed, self._covers = {}, {}
            for executable in catalog.mixed:
                for entry in executable.entries:
                    self._mixed.setdefault(entry[:2], []).append(executable)
        self.catalog = catalog
        self._tightest_ns = tightest_ns
        self.forget()

    def mixed_at(self, place: Place) -> Sequence[Executable]:
        """What runs this place together with others."""
        return self._mixed.get(place, ())

    def forget(self, families: Collection[int] | None = None) -> None:
        """Latencies have moved, of all families or of some."""
        if families is None:
            self._known.clear()
            return
        for key in [key for key in self._known if key[0] in families]:
            del self._known[key]

    def of(self, place: Place, factor: int = AS_OTHERS) -> PlaceCosts:
        family, segment = place
        known = self._known.get((family, factor))
        if known is None:
            known = self._known[family, factor] = self._work_out(family, factor)
        return known[segment] if segment < len(known) else UNSERVABLE  # no such segment: the family has gone

    def slip(self, family: int, ns: int) -> int:
        """By how much a run may take longer, if it is so much with a chance of 1%: where runs vary more than by a
        quarter of the SLO nobody can be sure, and who is refused for it is late with a chance of 100%."""
        return min(ns, self._tightest_ns.get(family, FAR) >> 2)

    def _work_out(self, family: int, factor: int) -> tuple[PlaceCosts, ...]:
        """Of all segments."""
        count = self.catalog.segments_of(family)
        options = self._options(family, count, factor)
        widest = sustained(options[0], self._tightest_ns.get(family, FAR)) if options[0] else FAR
        costs = [UNSERVABLE] * (count + 1)
        for segment in reversed(range(count)):
            if options[segment]:
                slo_ns = self._tightest_ns.get(family, FAR)
                cover = Cover(quick(capped(options[segment], self.cap_ns)), self._covers.get((family, segment)))
                if factor == AS_OTHERS:
                    self._covers[family, segment] = cover
                costs[segment] = place_costs(options[segment], widest, costs[segment + 1], segment, slo_ns, cover)
        return tuple(costs[:count])

    def _options(self, family: int, count: int, factor: int) -> list[tuple[Option, ...]]:
        """Of each segment; none where what follows cannot be run."""
        found: list[tuple[Option, ...]] = [()] * (count + 1)
        for segment in reversed(range(count)):
            if segment + 1 < count and not found[segment + 1]:
                break
            executables, rest = self.catalog.by_place.get((family, segment), ()), found[segment + 1]
            found[segment] = tuple([self._option(executable, factor, rest) for executable in executables])
        return found[:count]

    def _option(self, executable: Executable, factor: int, rest: Sequence[Option]) -> Option:
        family, _, width = executable.entries[0]
        l50_ns, l99_ns = self.latency.of(executable.id)
        if factor != AS_OTHERS:
            l50_ns, l99_ns = l50_ns * factor // AS_OTHERS, l99_ns * factor // AS_OTHERS
        mostly_ns, slip_ns = l50_ns, self.slip(family, l99_ns - l50_ns)
        if rest:
            mostly_ns += together(rest, width)
            slip_ns = round(hypot(slip_ns, slip_of(rest, width)))
        return made(Option, (width, executable.id, l50_ns, l99_ns, mostly_ns + slip_ns, mostly_ns, slip_ns))


def together(options: Sequence[Option], lanes: int) -> int:
    """How long so many lanes mostly take, if they stay together as far as there are executables for it."""
    for option in options:
        if option.width >= lanes:
            return option.mostly_ns
    return -(-lanes // options[-1].width) * options[-1].mostly_ns if options else 0


def slip_of(options: Sequence[Option], lanes: int) -> int:
    return next((o.slip_ns for o in options if o.width >= lanes), options[-1].slip_ns) if options else 0


def sustained(options: Sequence[Option], slo_ns: int) -> int:
    """The most efficient width that requests can wait for, while it runs with others, and then run in themselves."""
    can = [(o.width / max(1, o.mostly_ns), -o.width) for o in options if 2 * o.through_ns <= slo_ns]
    return -max(can)[1] if can else options[0].width


def place_costs(
    options: tuple[Option, ...], widest: int, rest: PlaceCosts, segment: int, slo_ns: int, cover: Cover
) -> PlaceCosts:
    widths = tuple([o.width for o in options])
    at = max(0, bisect_right(widths, widest) - 1)
    first, steady = options[0], options[at]
    fastest = min(options, key=lambda o: o.l50_ns)  # a wider one may have turned out to take less
    lane_ns = -(-steady.l50_ns // steady.width)
    fixed_ns = max(0, first.l50_ns - lane_ns)
    slip_ns = min(fastest.l99_ns - fastest.l50_ns, slo_ns >> 2)
    alone = Quantiles(fastest.l50_ns + rest.alone.l50_ns, fastest.l50_ns + slip_ns + rest.alone.l99_ns)
    ahead_ns = steady.through_ns if segment else fastest.through_ns
    return PlaceCosts(
        options,
        alone,
        lane_ns + rest.lane_ns,
        rest.lane_ns,
        fixed_ns + rest.first_ns,
        fixed_ns,
        at,
        slo_ns,
        widths[: at + 1],
        max(ahead_ns, alone.l50_ns),  # a head that is not hopeless has the time
        cover,
        rest.runs + 1 if rest.options else 1,
    )


def capped(options: tuple[Option, ...], cap_ns: int) -> tuple[Option, ...]:
    """Those that block nobody past rescue; all of them where even the narrowest does."""
    return tuple([o for o in options if is_short(o, cap_ns)]) or options


def is_short(option: Option, cap_ns: int) -> bool:
    """With what may go wrong, but for what is no plan's fault: one run that took very long would rule it out for good,
    since it never ran again."""
    _, _, l50_ns, l99_ns, _, _, _ = option
    return l50_ns + min(l99_ns - l50_ns, cap_ns >> 2) <= cap_ns


def quick(options: tuple[Option, ...]) -> tuple[Option, ...]:
    """Without those than which a wider one takes markedly less time."""
    least_ns = [*accumulate([o.mostly_ns for o in reversed(options)], min)][::-1]
    return tuple([o for o, ns in zip(options, least_ns, strict=True) if MARKEDLY * ns >= (MARKEDLY - 1) * o.mostly_ns])
