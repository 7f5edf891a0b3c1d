"""Doubts of predictions that rule out what comes to an idle device: if nothing runs, no run puts them right.

They are doubted where an executable is believed to take longer than it did when it was warmed up, and only for a
request that is in time if it takes that, and with which nobody came who is served without: a deadline that was never
possible is no reason. `latency` hopes for the warm-up's time then. A hope that nothing is run for is given up.

The next doubt comes RUNS times as long after the last one as a run is believed to take, then after twice that, and so
on up to LONGEST_NS, or SELDOM times as long, until one comes true. So a device that stays slow is tried ever more
seldom, and one that was slow for a while serves again after about as long as it was slow, or LONGEST_NS.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from coalesce.scheduler.catalog import Executable
from coalesce.scheduler.costs import Costs
from coalesce.scheduler.request import Request
from coalesce.scheduler.tenancy import Tenancy

RUNS = 8
SELDOM = 64  # the same, where doubts do not come true
LONGEST_NS = 250_000_000


class Pauses:
    """Between doubts."""

    def __init__(self) -> None:
        self._last_ns = 0
        self._pause_ns = LONGEST_NS

    def rest(self, now_ns: int) -> None:
        """What is predicted has just been measured."""
        self._last_ns, self._pause_ns = now_ns, LONGEST_NS

    def come_true(self) -> None:
        self._pause_ns = 0

    def is_due(self, run_ns: int, now_ns: int) -> bool:
        """Whether to doubt now that a run takes so long; then it counts as done."""
        passed_ns, longest_ns = now_ns - self._last_ns, max(LONGEST_NS, SELDOM * run_ns)
        pause_ns = min(max(self._pause_ns, RUNS * run_ns), longest_ns)
        if passed_ns < pause_ns:
            return False
        self._pause_ns = 2 * pause_ns if passed_ns < 2 * longest_ns else 0
        self._last_ns = now_ns
        return True


class Doubt:
    def __init__(self, costs: Costs, tenancy: Tenancy) -> None:
        self._costs, self._tenancy = costs, tenancy
        self.pauses = Pauses()
        self._family = 0
        self.hoped: list[int] = []  # executables, while it is open whether anything is run for them
        self._first = 0  # the one that is then

    def arise(self, requests: Iterable[Request], now_ns: int) -> int | None:
        """These come to an idle device; the family whose predictions have moved."""
        found: Request | None = None
        for request in requests:
            account, left_ns = self._tenancy.get(request.tenant), request.deadline_ns - now_ns
            if account is None or account.leaving or account.tenant.quota <= 0 or left_ns <= 0:
                continue
            if self._costs.of((request.family, 0)).alone.l50_ns <= left_ns:
                return None
            if found is None and sum(map(self._hoped_ns, self._quickest(request.family))) <= left_ns:
                found = request
        if found is None or not self.pauses.is_due(self._costs.of((found.family, 0)).alone.l50_ns, now_ns):
            return None
        path = self._quickest(found.family)
        self._family, self._first = found.family, path[0].id
        self.hoped = self._costs.latency.hope([e.id for e in path], found.deadline_ns - now_ns)
        return found.family

    def settle(self, running: int | None, waiting: int) -> int | None:
        """After what arose: gives the hope up if another executable runs, or none does and nobody waits; the family
        whose predictions have moved."""
        if running is None and waiting:
            return None
        hoped, self.hoped = self.hoped, []
        if running == self._first:
            return None
        self._costs.latency.give_up(hoped)
        return self._family

    def _quickest(self, family: int) -> Sequence[Executable]:
        """Of each segment, if all goes well."""
        catalog, path = self._costs.catalog, []
        for segment in range(catalog.segments_of(family)):
            options = self._costs.of((family, segment)).options
            path.append(min((catalog.by_id[o.executable] for o in options), key=self._hoped_ns))
        return path

    def _hoped_ns(self, executable: Executable) -> int:
        return self._costs.latency.hoped(executable.id)
