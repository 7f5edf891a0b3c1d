"""What a log says is waiting: for `invariants`, which sees requests from outside, not as the policy keeps them."""

from __future__ import annotations

from collections import Counter
from heapq import heappop, heappush

from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.commands import Reason
from coalesce.scheduler.request import Request


class Way:
    """A request that has not ended, on its way."""

    __slots__ = ("request", "segment", "bundle", "begun", "again", "alone", "withdrawn", "cancelled")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.segment = 0  # that is next, or runs
        self.bundle: int | None = None  # that it is in; None while it waits
        self.begun = False
        self.again: int | None = None  # how often it may run this segment again, once a bundle with it has failed
        self.alone = False  # in the last bundle that failed
        self.cancelled = False  # which its client knows at once
        self.withdrawn: Reason | None = None  # why it is not to run any more

    @property
    def place(self) -> tuple[int, int, bool]:
        return self.request.family, self.segment, self.begun


class Waiting:
    """Counts of what waits, and what begun."""

    def __init__(self) -> None:
        self.held: Counter[int] = Counter()  # lanes that have begun and not ended, by family
        self._places: Counter[tuple[int, int, bool]] = Counter()
        self._tenants: Counter[str] = Counter()  # of those that have not begun
        self._ways: dict[int, Way] = {}
        self._deadlines: list[tuple[int, int]] = []  # a heap, with what has gone since

    def of(self, tenant: str) -> int:
        return self._tenants[tenant]

    def add(self, way: Way) -> None:
        request = way.request
        self._places[way.place] += 1
        self._ways[request.id] = way
        heappush(self._deadlines, (request.deadline_ns, request.id))
        if not way.begun:
            self._tenants[request.tenant] += 1

    def end(self, way: Way) -> None:
        """Wherever it was."""
        self._leave(way)
        if way.begun:
            self.held[way.request.family] -= 1

    def begin(self, way: Way, bundle: int) -> None:
        self._leave(way)
        way.bundle = bundle
        if not way.begun:
            way.begun = True
            self.held[way.request.family] += 1

    def _leave(self, way: Way) -> None:
        if self._ways.pop(way.request.id, None) is None:
            return
        self._places[way.place] -= 1
        if not way.begun:
            self._tenants[way.request.tenant] -= 1

    def first_deadline(self) -> int | None:
        deadlines = self._deadlines
        while deadlines and deadlines[0][1] not in self._ways:
            heappop(deadlines)
        return deadlines[0][0] if deadlines else None

    def could_run(self, catalog: Catalog) -> bool:
        """Whether there is an executable for something that waits, and for all that it has ahead, and a slot."""
        return any(
            count and (begun or self._has_slot(family, catalog)) and is_servable(family, segment, catalog)
            for (family, segment, begun), count in self._places.items()
        )

    def _has_slot(self, family: int, catalog: Catalog) -> bool:
        slots = (catalog.slots or {}).get(family)
        return slots is None or self.held[family] < slots


def is_servable(family: int, segment: int, catalog: Catalog) -> bool:
    return all((family, ahead) in catalog.by_place for ahead in range(segment, catalog.segments_of(family)))
