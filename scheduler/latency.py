"""How long an executable takes: the warm-up's quantiles at first, those of its own last runs as soon as there are some.

A run costs what its width costs: lanes that are not used are padding and take as long. So a prediction is one of an
executable, and knows nothing of the number of lanes.

    own runs          prediction
    fewer than FEW    the warm-up's, times how far the device is off its warm-up at all (median over the last runs)
    FEW or more       median and largest of the last WINDOW runs; while they are fewer, with the spread of the warm-up

A run that takes more than SLOW times its l99 says something of its tenants (`quarantine`), not yet of its executable:
it is held back, and counts only when HELD of them came in a row and no tenant was in all of them. A prediction that has
moved by less than 1/32 stays as it is, so that what is derived from it can stay too. An executable that has not run
while STALE others did is predicted from its warm-up again: what looked slow once would never be tried otherwise.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

from coalesce.scheduler.catalog import Catalog, Executable

FEW = 6
WINDOW = 24
SLOW = 2
HELD = 4
STALE = 256


class Prediction(NamedTuple):
    """What was expected of a run when it was dispatched, and what came."""

    bundle: int
    executable: int
    lanes: int
    l50_ns: int
    l99_ns: int
    actual_ns: int


class Quantiles(NamedTuple):
    l50_ns: int
    l99_ns: int


class Runs:
    """The last runs of one executable, in their order and in order of their times."""

    __slots__ = ("last", "ascending", "held")

    def __init__(self) -> None:
        self.last: deque[int] = deque()
        self.ascending: list[int] = []
        self.held: list[tuple[int, frozenset[str]]] = []

    def add(self, time_ns: int, l99_ns: int, tenants: frozenset[str] | None) -> bool:
        """False where it is held back."""
        if time_ns <= SLOW * l99_ns:
            self.held.clear()
            self._count(time_ns)
            return True
        if tenants is None:
            return False
        self.held = [*self.held[-WINDOW:], (time_ns, tenants)]
        if len(self.held) < HELD or frozenset.intersection(*(who for _, who in self.held)):
            return False
        for held_ns, _ in self.held:
            self._count(held_ns)
        self.held.clear()
        return True

    def _count(self, time_ns: int) -> None:
        self.last.append(time_ns)
        insort(self.ascending, time_ns)
        if len(self.last) > WINDOW:
            del self.ascending[bisect_left(self.ascending, self.last.popleft())]

    def quantiles(self, prior: Executable) -> Quantiles:
        """As long as there are few, the slowest of them says little: then they spread as in the warm-up, or by half."""
        l50_ns, l99_ns = self.ascending[len(self.ascending) // 2], self.ascending[-1]
        if len(self.last) == WINDOW:
            return Quantiles(l50_ns, l99_ns)
        spread = min(1.5, prior.l99_ns / max(1, prior.l50_ns))
        return Quantiles(l50_ns, max(l99_ns, int(l50_ns * spread)))


class Fresh:
    """Which executables have run lately."""

    def __init__(self) -> None:
        self._runs = 0
        self._last: dict[int, int] = {}  # the number of the last run of each of them, ascending

    def note(self, executable: int) -> list[int]:
        """This one runs; returns those that no longer have."""
        self._runs += 1
        self._last.pop(executable, None)
        self._last[executable] = self._runs
        stale = []
        while self._last[(first := next(iter(self._last)))] < self._runs - STALE:
            del self._last[first]
            stale.append(first)
        return stale


class LatencyModel:
    def __init__(self, remembered: int = 4096):
        self.predictions: deque[Prediction] = deque(maxlen=remembered)  # for export: predicted beside actual
        self._warm_up: Mapping[int, Executable] = {}
        self._runs: dict[int, Runs] = {}
        self._published: dict[int, Quantiles] = {}
        self._off: deque[float] = deque(maxlen=WINDOW)  # actual / warm-up of the last runs of all executables
        self._scale = 1.0
        self._fresh = Fresh()
        self.others_moved = False  # whether the last run has moved predictions of others than its own executable

    def change(self, catalog: Catalog) -> None:
        """Takes another catalog; what is known of executables in both stays known."""
        kept = {id for id, e in catalog.by_id.items() if self._warm_up.get(id) == e}
        self._warm_up = catalog.by_id
        self._runs = {id: runs for id, runs in self._runs.items() if id in kept}
        self._published = {id: q for id, q in self._published.items() if id in kept}

    def of(self, executable: int) -> Quantiles:
        known = self._published.get(executable)
        if known is None:
            prior = self._warm_up[executable]
            known = Quantiles(int(prior.l50_ns * self._scale), int(prior.l99_ns * self._scale))
            self._published[executable] = known
        return known

    def warm_up_of(self, executable: int) -> Quantiles:
        known = self._warm_up[executable]
        return Quantiles(known.l50_ns, known.l99_ns)

    def doubt(self) -> None:
        """Predicts from warm-ups again, until runs say otherwise again."""
        self._runs.clear()
        self._published.clear()
        self._off.clear()
        self._scale = 1.0

    def observe(self, run: Prediction, tenants: frozenset[str] | None) -> bool:
        """Learns from a run; True where predictions have moved, of this executable or, with the device, of others.

        `tenants` may be the reason if it was slow; where that is known, it is None.
        """
        self.predictions.append(run)
        prior = self._warm_up.get(run.executable)
        if prior is None:  # it left the catalog while it ran
            return False
        self.others_moved = self._forget_stale(run.executable)
        return self._learn(run, tenants, prior) or self.others_moved

    def _forget_stale(self, executable: int) -> bool:
        forgotten = False
        for stale in self._fresh.note(executable):
            forgotten |= self._runs.pop(stale, None) is not None and self._published.pop(stale, None) is not None
        return forgotten

    def _learn(self, run: Prediction, tenants: frozenset[str] | None, prior: Executable) -> bool:
        runs = self._runs.setdefault(run.executable, Runs())
        if not runs.add(run.actual_ns, self.of(run.executable).l99_ns, tenants):
            return False
        rescaled = self._rescale(run.actual_ns / max(1, prior.l50_ns))
        self.others_moved |= rescaled
        if len(runs.last) < FEW:
            return rescaled
        new, old = runs.quantiles(prior), self.of(run.executable)
        if all(abs(n - o) * 32 <= o for n, o in zip(new, old, strict=True)):
            return rescaled
        self._published[run.executable] = new
        return True

    def _rescale(self, off: float) -> bool:
        """Moves what is known from warm-ups alone when the whole device turns out faster or slower than it was then."""
        self._off.append(off)
        scale = median(self._off) if len(self._off) >= FEW else 1.0
        if abs(scale - self._scale) * 16 <= self._scale:
            return False
        self._scale = scale
        learnt = {id for id, runs in self._runs.items() if len(runs.last) >= FEW}
        self._published = {id: q for id, q in self._published.items() if id in learnt}
        return True
