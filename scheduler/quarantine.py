"""Who makes bundles slow, and runs alone for it.

    with everybody --- two slow bundles with it ---> suspected: apart with few others, to be seen
    suspected ------- a clean run ---> with everybody          slow runs ---> fewer others, and alone
                      alone, and guilty by the evidence ---> in quarantine
    in quarantine --- TERM over, and CLEAN clean runs in a row ---> on probation, with everybody
    on probation ---- a slow bundle with it ---> suspected, and in quarantine sooner, for twice as long
    on probation ---- a clean one when the term is over ---> nothing is held against it

What is a slow run, and whose fault slow runs may be, says `evidence`. Suspected are only tenants that two slow bundles
had in common, and that were in no clean one since: apart they harm nobody, so that there is time to be sure. Innocents
among them are back after one run of their own, or when the slow runs turn out to be nobody's fault. Nobody is told of
them: `Quarantine` and `Readmit` are for those that are guilty.

A tenant whose requests fail alone is treated as one that is slow: each time, bundles around it are run again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from enum import Enum

from coalesce.scheduler.commands import Quarantine, Readmit
from coalesce.scheduler.evidence import Evidence, WINDOW_NS
from coalesce.scheduler.times import SLOW

TERM_NS = 1_000_000_000
LONGEST_TERMS = 64
CLEAN = 3
FAILURES = 3
RUNS = 8
LOTS = 16  # into which suspects are dealt: so many runs show which of them it is
NOBODY: frozenset[str] = frozenset()


class State(Enum):
    SUSPECTED = "suspected"
    QUARANTINED = "quarantined"
    PROBATION = "on probation"


class Standing:
    __slots__ = ("state", "lot", "since_ns", "terms", "clean", "slow", "row", "took_ns", "factor", "hoped_ns")

    def __init__(self, state: State, lot: int, since_ns: int, terms: int = 1):
        self.state = state
        self.lot = lot
        self.since_ns = since_ns
        self.terms = terms  # that its quarantine lasts: this one, or else the next
        self.clean = 0  # runs in a row
        self.slow = 0  # runs alone
        self.row = 0  # in which the last of them was
        self.took_ns = 0  # the last of them
        self.factor = 4  # how much longer its runs take, in quarters
        self.hoped_ns = since_ns  # when it was last taken to be as quick as others

    def is_over(self, now_ns: int) -> bool:
        return now_ns - self.since_ns >= self.terms * TERM_NS


class Watch:
    """What is held against tenants; who is not in it shares bundles with everybody."""

    def __init__(self) -> None:
        # Who may be the reason why the last run was slow; None where it runs apart, so that it teaches nothing.
        self.blamed: frozenset[str] | None = NOBODY
        self._moved: list[str] = []  # tenants whose lot has changed, and whose lanes do not know
        self.standings: dict[str, Standing] = {}
        self._evidence = Evidence()
        self._failures: dict[str, deque[int]] = {}  # when the last FAILURES of each tenant were
        self._lots = 0

    def lot(self, tenant: str) -> int:
        standing = self.standings.get(tenant)
        return standing.lot if standing is not None else 0

    def factor(self, lot: int) -> int:
        """How much longer runs of this lot take, in quarters."""
        return max((s.factor for s in self.standings.values() if s.lot == lot), default=4) if lot else 4

    def hope(self, tenant: str, now_ns: int) -> None:
        """A request of it was refused: now and then its runs are taken to be as quick as others, or they never run.
        Of who is guilty that is once a term, of a suspect once RUNS times as long as its last one took."""
        standing = self.standings.get(tenant)
        if standing is None:
            return
        is_suspect = standing.state is State.SUSPECTED
        if now_ns - standing.hoped_ns >= (min(TERM_NS, RUNS * standing.took_ns) if is_suspect else TERM_NS):
            standing.hoped_ns = now_ns
            standing.factor = 4

    def take_moved(self) -> list[str]:
        """Whose lot has changed since this was last asked."""
        moved = self._moved
        if moved:
            self._moved = []
        return moved

    def new_lot(self) -> int:
        self._lots += 1
        return self._lots

    def forget(self, tenant: str) -> None:
        """It has gone; nothing is held against another one that comes under its name."""
        self.standings.pop(tenant, None)
        self._failures.pop(tenant, None)
        self._evidence.forget(tenant)

    def see(self, names: Collection[str], took_ns: int, l99_ns: int, now_ns: int) -> list[Quarantine | Readmit]:
        """Draws conclusions from a run with lanes of these; `l99_ns` is what it takes without anything held against
        its tenants."""
        slow, excess_ns = took_ns > SLOW * l99_ns, took_ns - l99_ns
        who = frozenset(names)
        self.blamed = who if slow else NOBODY
        if not slow and not self.standings:
            self._evidence.clear(who, excess_ns)
            return []
        tenants = list(dict.fromkeys(names))  # in an order that does not change from process to process
        standing = self.standings.get(next(iter(tenants))) if len(tenants) == 1 else None
        factor = -(-4 * took_ns // max(1, l99_ns))
        if standing is not None and standing.state is State.QUARANTINED:
            self.blamed = None
            return self._see_apart(next(iter(tenants)), standing, slow, factor, now_ns)
        if not slow:
            self._evidence.clear(who, excess_ns)
            self._forgive(tenants, now_ns)
            return self._judge(now_ns)
        if self._has_guilty(tenants):  # it began before that one was put apart, which explains it
            return []
        is_suspect = standing is not None and standing.state is State.SUSPECTED
        if not is_suspect and self._evidence.is_hidden(excess_ns):
            self.blamed = NOBODY
            self._evidence.hide(who, excess_ns)
            return []
        if not self._evidence.strike(who, excess_ns, now_ns, self.standings, is_suspect):
            self.blamed = NOBODY
            self._release()
            return []
        if standing is not None and is_suspect:
            self.blamed = None
            self._part(tenants, standing)
            standing.slow += 1
            standing.row, standing.took_ns = self._evidence.row, took_ns
            standing.factor = factor if standing.slow > 1 else standing.factor
            return []
        known = [t for t in tenants if t in self.standings]
        common = self._evidence.common(tenants)
        self._deal(known or [t for t in tenants if t in common], now_ns, slow=int(len(tenants) == 1))
        return []

    def _has_guilty(self, tenants: Collection[str]) -> bool:
        standings = [self.standings[tenant] for tenant in tenants if tenant in self.standings]
        return any(standing.state is State.QUARANTINED for standing in standings)

    def fail(self, tenant: str, now_ns: int) -> list[Quarantine | Readmit]:
        """A request of it failed alone: FAILURES of them in a window count as being slow alone."""
        last = self._failures.setdefault(tenant, deque(maxlen=FAILURES))
        last.append(now_ns)
        often = len(last) == FAILURES and now_ns - last[0] < WINDOW_NS
        return self._quarantine(tenant, now_ns, failed=True) if often else []

    def _see_apart(
        self, tenant: str, standing: Standing, slow: bool, factor: int, now_ns: int
    ) -> list[Quarantine | Readmit]:
        """A run in quarantine says nothing of anybody else."""
        if slow:
            standing.clean, standing.factor = 0, factor
            return []
        standing.clean += 1
        if standing.clean < CLEAN or not standing.is_over(now_ns):
            return []
        self._probe(tenant, standing, now_ns)
        return [Readmit(tenant)]

    def _probe(self, tenant: str, known: Standing, now_ns: int) -> None:
        self.standings[tenant] = Standing(State.PROBATION, 0, now_ns, min(LONGEST_TERMS, 2 * known.terms))
        self._moved.append(tenant)

    def _forgive(self, tenants: Collection[str], now_ns: int) -> None:
        """They were in a clean run."""
        for tenant in tenants if self.standings else ():
            standing = self.standings.get(tenant)
            if standing is None:
                continue
            if standing.state is State.SUSPECTED or standing.is_over(now_ns):
                self._unsuspect(tenant, standing, now_ns)

    def _release(self) -> None:
        """What some were suspected of is nobody's fault. Who still is suspected of something else is not believed to
        be as slow as its runs alone were, if they were slow for that: else it would be refused, and never cleared."""
        for tenant, standing in list(self.standings.items()):
            if standing.state is not State.SUSPECTED:
                continue
            if not self._evidence.is_against(tenant):
                self._unsuspect(tenant, standing, standing.since_ns)
            elif standing.row == self._evidence.row:
                standing.factor = 4

    def _unsuspect(self, tenant: str, standing: Standing, now_ns: int) -> None:
        """Who was on probation before it was suspected is so again."""
        if standing.state is State.SUSPECTED and standing.terms > 1:
            self.standings[tenant] = Standing(State.PROBATION, 0, now_ns, standing.terms)
        else:
            del self.standings[tenant]
        if standing.lot:
            self._moved.append(tenant)

    def _judge(self, now_ns: int) -> list[Quarantine | Readmit]:
        """Of those that were slow alone, after a clean run of others."""
        if not self.standings:
            return []
        accused = [(t, s) for t, s in self.standings.items() if s.state is State.SUSPECTED and s.slow]
        guilty = [t for t, s in accused if self._evidence.convicts(t, int(s.terms > 1))]
        return [command for tenant in guilty for command in self._quarantine(tenant, now_ns)]

    def _deal(self, suspects: list[str], now_ns: int, slow: int) -> None:
        lots = [self.new_lot() for _ in range(min(LOTS, len(suspects)))]
        for i, tenant in enumerate(suspects):
            known = self.standings.get(tenant)
            terms = known.terms if known is not None else 1
            dealt = self.standings[tenant] = Standing(State.SUSPECTED, lots[i % len(lots)], now_ns, terms)
            dealt.slow, dealt.row = slow, self._evidence.row
            self._moved.append(tenant)

    def _part(self, tenants: Collection[str], slow: Standing) -> None:
        """How slow one of a lot is alone says nothing of the others, who would be refused for it."""
        if any(s.lot == slow.lot for s in self.standings.values() if s is not slow):
            slow.lot = self.new_lot()
            self._moved += tenants

    def _quarantine(self, tenant: str, now_ns: int, failed: bool = False) -> list[Quarantine | Readmit]:
        known = self.standings.get(tenant)
        if known is not None and known.state is State.QUARANTINED:
            known.clean = 0
            return []
        terms, factor = (known.terms, known.factor) if known is not None else (1, 4)
        self.standings[tenant] = Standing(State.QUARANTINED, self.new_lot(), now_ns, terms)
        self.standings[tenant].factor = factor
        self._moved.append(tenant)
        self._evidence.settle(tenant)
        return [Quarantine(tenant, failed)]
