"""Who makes bundles slow, and runs alone for it.

    with everybody --- two slow bundles with it in WINDOW ---> suspected: apart with few others, to be seen
    suspected ------- a clean run ---> with everybody          a slow run ---> fewer others, and alone: in quarantine
    in quarantine --- TERM over, and CLEAN clean runs in a row ---> on probation, with everybody
    on probation ---- a slow bundle with it ---> in quarantine, for twice as long
    on probation ---- a clean one when the term is over ---> nothing is held against it

A run is slow when it takes SLOW times the l99 that was predicted. Suspected are only tenants that every slow bundle
had in common, and that were in no clean one since. Innocents among them are back after one run of their own, and
nobody is told of them: `Quarantine` and `Readmit` are for those that were slow alone.

Slow runs in a row that no tenant was in all of say something of the device, and of nobody.

A tenant whose requests fail alone is treated as one that is slow: each time, bundles around it are run again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from enum import Enum

from coalesce.scheduler.commands import Quarantine, Readmit
from coalesce.scheduler.latency import SLOW

WINDOW_NS = 1_000_000_000
TERM_NS = 1_000_000_000
LONGEST_TERMS = 64
CLEAN = 3
FAILURES = 3
LOTS = 16  # into which suspects are dealt: so many runs show which of them it is


class State(Enum):
    SUSPECTED = "suspected"
    QUARANTINED = "quarantined"
    PROBATION = "on probation"


class Standing:
    __slots__ = ("state", "lot", "since_ns", "terms", "clean", "factor", "hoped_ns")

    def __init__(self, state: State, lot: int, since_ns: int, terms: int = 1):
        self.state = state
        self.lot = lot
        self.since_ns = since_ns
        self.terms = terms  # that its quarantine lasts: this one, or else the next
        self.clean = 0  # runs in a row
        self.factor = 4  # how much longer its runs take, in quarters
        self.hoped_ns = since_ns  # when it was last taken to be as quick as others

    def is_over(self, now_ns: int) -> bool:
        return now_ns - self.since_ns >= self.terms * TERM_NS


class Watch:
    """What is held against tenants; who is not in it shares bundles with everybody."""

    def __init__(self) -> None:
        self._moved: list[str] = []  # tenants whose lot has changed, and whose lanes do not know
        self._standings: dict[str, Standing] = {}
        self._strikes: deque[tuple[int, set[str]]] = deque()  # slow bundles: when, and who may have been the reason
        self._failures: deque[tuple[int, str]] = deque()
        self._lots = 0
        self._row: frozenset[str] | None = None  # who was in all slow bundles since the last clean one

    def lot(self, tenant: str) -> int:
        standing = self._standings.get(tenant)
        return standing.lot if standing is not None else 0

    def factor(self, lot: int) -> int:
        """How much longer runs of this lot take, in quarters."""
        return max((s.factor for s in self._standings.values() if s.lot == lot), default=4) if lot else 4

    def hope(self, tenant: str, now_ns: int) -> None:
        """A request of it was refused: once a term its runs are taken to be as quick as others, or they never run."""
        standing = self._standings.get(tenant)
        if standing is not None and now_ns - standing.hoped_ns >= TERM_NS:
            standing.hoped_ns = now_ns
            standing.factor = 4

    def take_moved(self) -> list[str]:
        """Whose lot has changed since this was last asked."""
        moved, self._moved = self._moved, []
        return moved

    def new_lot(self) -> int:
        self._lots += 1
        return self._lots

    def forget(self, tenant: str) -> None:
        self._standings.pop(tenant, None)

    def see(self, tenants: Collection[str], took_ns: int, l99_ns: int, now_ns: int) -> list[Quarantine | Readmit]:
        """Draws conclusions from a run; `l99_ns` is what it takes without anything held against its tenants."""
        slow = took_ns > SLOW * l99_ns
        if slow and self._is_of_device(tenants):
            return []
        if not slow:
            self._row = None
        if len(tenants) == 1:
            return self._see_alone(next(iter(tenants)), slow, -(-4 * took_ns // max(1, l99_ns)), now_ns)
        return self._see_slow(tenants, now_ns) if slow else self._see_clean(tenants, now_ns)

    def _is_of_device(self, tenants: Collection[str]) -> bool:
        """Whether slow runs came in a row, and no tenant was in all of them."""
        self._row = frozenset(tenants) if self._row is None else self._row.intersection(tenants)
        return not self._row

    def fail(self, tenant: str, now_ns: int) -> list[Quarantine | Readmit]:
        """A request of it failed alone: FAILURES of them in a window count as being slow alone."""
        self._failures.append((now_ns, tenant))
        while now_ns - self._failures[0][0] >= WINDOW_NS:
            self._failures.popleft()
        often = sum(who == tenant for _, who in self._failures) >= FAILURES
        return self._quarantine(tenant, now_ns) if often else []

    def _see_alone(self, tenant: str, slow: bool, factor: int, now_ns: int) -> list[Quarantine | Readmit]:
        standing = self._standings.get(tenant)
        if standing is None or standing.state is State.PROBATION:
            return self._see_slow((tenant,), now_ns) if slow else self._see_clean((tenant,), now_ns)
        if slow:
            commands = self._quarantine(tenant, now_ns)
            self._standings[tenant].factor = factor
            return commands
        if standing.state is State.SUSPECTED:
            return self._see_clean((tenant,), now_ns)
        standing.clean += 1
        if standing.clean < CLEAN or not standing.is_over(now_ns):
            return []
        self._standings[tenant] = Standing(State.PROBATION, 0, now_ns, min(LONGEST_TERMS, 2 * standing.terms))
        self._moved.append(tenant)
        return [Readmit(tenant)]

    def _see_clean(self, tenants: Collection[str], now_ns: int) -> list[Quarantine | Readmit]:
        for _, who in self._strikes:
            who.difference_update(tenants)
        if not self._standings:
            return []
        for tenant in tenants:
            standing = self._standings.get(tenant)
            if standing is None or standing.state is State.QUARANTINED:
                continue
            if standing.state is State.SUSPECTED or standing.is_over(now_ns):
                del self._standings[tenant]
                if standing.lot:
                    self._moved.append(tenant)
        return []

    def _see_slow(self, tenants: Collection[str], now_ns: int) -> list[Quarantine | Readmit]:
        on_probation = [t for t in tenants if t in self._standings and self._standings[t].state is State.PROBATION]
        if len(on_probation) == 1:
            return self._quarantine(on_probation[0], now_ns)
        suspected = [t for t in tenants if t in self._standings]
        if suspected:
            self._deal(suspected, now_ns)
            return []
        while self._strikes and (now_ns - self._strikes[0][0] >= WINDOW_NS or not self._strikes[0][1]):
            self._strikes.popleft()
        common = set(tenants)
        for _, who in self._strikes:
            common = common & who or common
        seen_before = any(common <= who for _, who in self._strikes)
        self._strikes.append((now_ns, set(tenants)))
        if not seen_before:
            return []
        if len(common) == 1:
            return self._quarantine(common.pop(), now_ns)
        self._deal([t for t in tenants if t in common], now_ns)
        return []

    def _deal(self, suspects: list[str], now_ns: int) -> None:
        lots = [self.new_lot() for _ in range(min(LOTS, len(suspects)))]
        for i, tenant in enumerate(suspects):
            known = self._standings.get(tenant)
            terms = known.terms if known is not None else 1
            self._standings[tenant] = Standing(State.SUSPECTED, lots[i % len(lots)], now_ns, terms)
            self._moved.append(tenant)

    def _quarantine(self, tenant: str, now_ns: int) -> list[Quarantine | Readmit]:
        known = self._standings.get(tenant)
        if known is not None and known.state is State.QUARANTINED:
            known.clean = 0
            return []
        terms = known.terms if known is not None else 1
        self._standings[tenant] = Standing(State.QUARANTINED, self.new_lot(), now_ns, terms)
        self._moved.append(tenant)
        self._clear_after(tenant)
        return [Quarantine(tenant)]

    def _clear_after(self, guilty: str) -> None:
        """What it was the reason for is held against nobody else."""
        for strike in list(self._strikes):
            if guilty in strike[1]:
                self._strikes.remove(strike)
