"""How long an executable takes: the warm-up's quantiles at first, those of its own last runs as soon as there are some.

A run costs what its width costs: lanes that are not used are padding and take as long. So a prediction is one of an
executable, and knows nothing of the number of lanes.

    own runs          prediction
    fewer than FEW    the warm-up's, times how far the device is off its warm-up at all (median over the last runs)
    FEW or more       that of the last ones (`times`)

A prediction that has moved by less than 1/32 stays as it is, so that what is derived from it can stay too. An
executable that has not run while STALE others did is predicted from its warm-up again: what looked slow once would
never be tried otherwise.

Where predictions rule everything out (`doubt`), an executable that was slower is hoped to take what it took when it was
warmed up, never less, for as long as its runs keep within the time that there was. One that does not ends it; after
OFTEN that do what was learnt before is forgotten, and of other executables what is as far off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from coalesce.scheduler.catalog import Catalog, Executable
from coalesce.scheduler.times import Quantiles, Runs, SLOW, spread_of, WINDOW

FEW = 6
STALE = 256
OFTEN = 3


class Prediction(NamedTuple):
    """What was expected of a run when it was dispatched, and what came."""

    bundle: int
    executable: int
    lanes: int
    l50_ns: int
    l99_ns: int
    actual_ns: int


class Hope(NamedTuple):
    """That an executable is quicker than it was."""

    instead_of: Quantiles
    within_ns: int  # no run of it is to take longer
    fulfilled: int  # by so many runs


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
        self._hopes: dict[int, Hope] = {}
        self._fresh = Fresh()
        self.came_true = False  # whether a hope has, with the last run
        self.others_moved = False  # whether the last run has moved predictions of all executables
        self.stale: frozenset[int] = frozenset()  # and of which families, since theirs have not run for so long

    def change(self, catalog: Catalog) -> None:
        """Takes another catalog; what is known of executables in both stays known."""
        kept = {id for id, e in catalog.by_id.items() if self._warm_up.get(id) == e}
        self._warm_up = catalog.by_id
        self._runs = {id: runs for id, runs in self._runs.items() if id in kept}
        self._published = {id: q for id, q in self._published.items() if id in kept}
        self._hopes = {id: hope for id, hope in self._hopes.items() if id in kept}

    def of(self, executable: int) -> Quantiles:
        known = self._published.get(executable)
        if known is None:
            known = self._published[executable] = self._in_warm_up(executable, self._scale)
        return known

    def learnt(self, executable: int) -> Quantiles:
        """What it would be without hope."""
        hope = self._hopes.get(executable)
        return hope.instead_of if hope is not None else self.of(executable)

    def hoped(self, executable: int) -> int:
        """How long it takes if it is no slower than when it was warmed up."""
        return min(self.of(executable).l50_ns, self._in_warm_up(executable).l50_ns)

    def hope(self, executables: Sequence[int], within_ns: int) -> list[int]:
        """Predicts of those that were slower in runs that they take what they did in the warm-up, until one takes
        longer than its part of the time in which all are to be done; which these are."""
        hoped = [id for id in executables if self.of(id).l50_ns > self._in_warm_up(id).l50_ns]
        left_ns = within_ns - sum(self.of(id).l50_ns for id in executables if id not in hoped)
        whole_ns = sum(self._in_warm_up(id).l50_ns for id in hoped)
        for id in hoped:
            new, old = self._in_warm_up(id), self.learnt(id)
            self._hopes[id] = Hope(old, max(new.l50_ns, left_ns * new.l50_ns // whole_ns), 0)
            self._published[id] = new
        return hoped

    def give_up(self, hoped: Sequence[int]) -> None:
        """Predicts what was learnt again."""
        for id in hoped:
            hope = self._hopes.pop(id, None)
            if hope is not None:
                self._published[id] = hope.instead_of

    def _in_warm_up(self, executable: int, scale: float = 1.0) -> Quantiles:
        prior = self._warm_up[executable]
        l50_ns = max(1, int(prior.l50_ns * scale))
        return Quantiles(l50_ns, max(l50_ns, int(l50_ns * spread_of(prior))))

    def observe(self, run: Prediction, tenants: frozenset[str] | None) -> bool:
        """Learns from a run; True where predictions have moved, of this executable or, with the device, of others.

        `tenants` may be the reason if it was slow; where that is known, it is None.
        """
        self.predictions.append(run)
        self.came_true = False
        prior = self._warm_up.get(run.executable)
        if prior is None:  # it left the catalog while it ran
            return False
        self.others_moved, self.stale = False, self._forget_stale(run.executable)
        hope = self._hopes.pop(run.executable, None)
        if hope is None:
            return self._learn(run, tenants, prior) or bool(self.stale)
        if run.actual_ns > hope.within_ns:
            self._published[run.executable] = hope.instead_of
            self._learn(run, tenants, prior)
            return True
        return self._fulfil(hope, run, prior) or bool(self.stale)

    def _fulfil(self, hope: Hope, run: Prediction, prior: Executable) -> bool:
        """It came true again: often enough, and what was learnt before is of another time."""
        self.came_true = True
        runs = self._runs.setdefault(run.executable, Runs())
        runs.count(run.actual_ns)
        if hope.fulfilled + 1 < OFTEN:
            self._hopes[run.executable] = hope._replace(fulfilled=hope.fulfilled + 1)
            return False
        runs.keep(OFTEN)
        self._published[run.executable] = new = runs.quantiles(prior)
        self._off.clear()
        self._scale = new.l50_ns / max(1, prior.l50_ns)
        for id, known in list(self._published.items()):
            if known.l50_ns > SLOW * self._scale * self._warm_up[id].l50_ns:
                self._runs.pop(id, None)
                del self._published[id]
        self.others_moved = True
        return True

    def _forget_stale(self, executable: int) -> frozenset[int]:
        """The families whose predictions that moves."""
        moved: list[int] = []
        for stale in self._fresh.note(executable):
            self._hopes.pop(stale, None)
            if self._runs.pop(stale, None) is not None and self._published.pop(stale, None) is not None:
                moved += [entry.family for entry in self._warm_up[stale].entries]
        return frozenset(moved)

    def _learn(self, run: Prediction, tenants: frozenset[str] | None, prior: Executable) -> bool:
        runs = self._runs.get(run.executable)
        if runs is None:
            runs = self._runs[run.executable] = Runs()
        if not runs.add(run.actual_ns, self.of(run.executable).l99_ns, tenants):
            return False
        rescaled = self._rescale(run.actual_ns / max(1, prior.l50_ns))
        self.others_moved |= rescaled
        if len(runs.last) < FEW:
            return rescaled
        new = runs.quantiles(prior)
        (l50_ns, l99_ns), (old50_ns, old99_ns) = new, self.of(run.executable)
        if abs(l50_ns - old50_ns) * 32 <= old50_ns and abs(l99_ns - old99_ns) * 32 <= old99_ns:
            return rescaled
        self._published[run.executable] = new
        return True

    def _rescale(self, off: float) -> bool:
        """Moves what is known from warm-ups alone when the whole device turns out faster or slower than it was then."""
        self._off.append(off)
        scale = middle(self._off) if len(self._off) >= FEW else 1.0
        if abs(scale - self._scale) * 16 <= self._scale:
            return False
        self._scale = scale
        learnt = {id for id, runs in self._runs.items() if len(runs.last) >= FEW}
        self._published = {id: q for id, q in self._published.items() if id in learnt or id in self._hopes}
        return True


def middle(values: Collection[float]) -> float:
    """The median; of an even number the mean of two."""
    ascending, half = sorted(values), len(values) // 2
    return ascending[half] if len(values) % 2 else (ascending[half - 1] + ascending[half]) / 2
