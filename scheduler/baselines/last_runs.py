"""How long an executable takes, as Clockwork has it: the p99 of its last ten runs, the warm-up's before the first.

What has not run while many others did is predicted from its warm-up again, as in `LatencyModel`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median_high

from coalesce.scheduler.catalog import Catalog, Executable
from coalesce.scheduler.latency import Fresh, Prediction
from coalesce.scheduler.times import Quantiles

LAST = 10


class LastRuns:
    def __init__(self) -> None:
        self._warm_up: Mapping[int, Executable] = {}
        self._runs: dict[int, deque[int]] = {}
        self._fresh = Fresh()

    def change(self, catalog: Catalog) -> None:
        """Takes another catalog; what is known of executables in both stays known."""
        kept = {id for id, e in catalog.by_id.items() if self._warm_up.get(id) == e}
        self._warm_up = catalog.by_id
        self._runs = {id: runs for id, runs in self._runs.items() if id in kept}

    def of(self, executable: int) -> Quantiles:
        runs = self._runs.get(executable)
        if not runs:
            prior = self._warm_up[executable]
            return Quantiles(prior.l50_ns, prior.l99_ns)
        return Quantiles(median_high(runs), max(runs))  # the p99 of ten is their largest

    def observe(self, run: Prediction, tenants: frozenset[str]) -> bool:
        """True where the prediction has moved."""
        if run.executable not in self._warm_up:  # it left the catalog while it ran
            return False
        before = self.of(run.executable)
        self._runs.setdefault(run.executable, deque(maxlen=LAST)).append(run.actual_ns)
        stale = self._fresh.note(run.executable)
        for id in stale:
            self._runs.pop(id, None)
        return bool(stale) or self.of(run.executable) != before
