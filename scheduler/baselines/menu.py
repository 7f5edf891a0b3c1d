"""In which widths a place, a segment of a family, can be run; and how long that takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.costs import Place
from coalesce.scheduler.latency import Prediction
from coalesce.scheduler.times import Quantiles


@runtime_checkable
class Latency(Protocol):
    """`LatencyModel`, or another idea of how long executables take."""

    def change(self, catalog: Catalog) -> None: ...

    def of(self, executable: int) -> Quantiles: ...

    def observe(self, run: Prediction, tenants: frozenset[str]) -> bool: ...


class Option(NamedTuple):
    width: int
    executable: int
    l50_ns: int
    l99_ns: int
    through: Quantiles  # from here to the end of the program, if its lanes stay together


class Menu:
    def __init__(self, latency: Latency) -> None:
        self.catalog = Catalog()
        self.latency = latency
        self._known: dict[Place, tuple[Option, ...]] = {}

    def change(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.latency.change(catalog)
        self.forget()

    def forget(self) -> None:
        """Latencies have moved."""
        self._known.clear()

    def of(self, place: Place) -> tuple[Option, ...]:
        """Ascending in width; none where this segment or a later one has no executable."""
        known = self._known.get(place)
        if known is None:
            known = self._known[place] = self._work_out(place)
        return known

    def _work_out(self, place: Place) -> tuple[Option, ...]:
        family, segment = place
        last = segment + 1 == self.catalog.segments_of(family)
        after = () if last else self.of((family, segment + 1))
        if not (last or after):
            return ()
        options = []
        for executable in self.catalog.by_place.get(place, ()):
            width = executable.entries[0].width
            l50, l99 = self.latency.of(executable.id)
            rest = Quantiles(0, 0) if last else through(after, width)
            options.append(Option(width, executable.id, l50, l99, Quantiles(l50 + rest.l50_ns, l99 + rest.l99_ns)))
        return tuple(options)


def through(options: Sequence[Option], lanes: int) -> Quantiles:
    """Of so many lanes, in one run or in as many as they need."""
    for option in options:
        if option.width >= lanes:
            return option.through
    widest = options[-1]
    runs = -(-lanes // widest.width)
    return Quantiles(runs * widest.through.l50_ns, runs * widest.through.l99_ns)


def fastest(options: Sequence[Option]) -> Option:
    """The narrowest, unless a wider one has turned out to be faster."""
    return min(options, key=lambda o: o.through.l99_ns)


def most_lanes(options: Sequence[Option], waiting: int, left_ns: int) -> Option:
    """With most of those that wait, done in so long a time; the fastest where nothing is."""
    in_time = [option for option in options if option.through.l99_ns <= left_ns]
    return max(in_time or [fastest(options)], key=lambda o: (min(o.width, waiting), -o.l99_ns))


def opens_ns(options: Sequence[Option], option: Option, deadline_ns: int) -> int:
    """From when on nothing wider than this could be in time, so that waiting for more lanes gains nothing."""
    wider = next((o for o in options if o.width > option.width), None)
    return deadline_ns - wider.through.l99_ns if wider is not None else 0
