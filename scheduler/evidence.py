"""What slow runs are evidence of: of a tenant that makes them slow, or of a host that hiccups.

A run is slow when it takes SLOW times the l99 that was predicted. Where that is usual it says nothing of a bundle: the
floor is what all but one in OFTEN of the device's runs exceed their l99 by, slow ones among them once they have turned
out to be nobody's fault. A slow run that it hides is held against nobody and clears nobody. Who is suspected and runs
alone is compared with others by how often it is slow, and there is no floor.

    row         slow runs with no clean one between them: one hiccup may last for many runs, so they count once
    strike      a slow run, and who may have been the reason: who was in it and in no clean run since

A row that nobody was in all of is nobody's fault, and so is a strike of which nobody is left. But slow tenants that are
suspected already make such rows too, alone and one right after the other: what only suspects' own runs are in is
nobody's fault when more than half of the tenants were slow so, and else theirs until a clean run says better. Somebody
is guilty after ROWS rows with no clean run of theirs, and only when so many of them would not have come by chance: the
more of the runs of others are slow too, the more of them it takes. Where a run of others was as slow it takes
ROWS_ALIKE at least: what slows a host may keep step with who is asked in turn. Without runs of others nothing is there
to compare with.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Iterable
from typing import NamedTuple

WINDOW_NS = 1_000_000_000
MEMORY = 256  # runs
OFTEN = 8
ROWS = 3
ROWS_ALIKE = 8
DOUBT_BITS = 20.0  # one in a million
PRIOR_ROWS, PRIOR_RUNS = 0.5, 64.0  # that were seen before any was


class Strike(NamedTuple):
    at_ns: int
    row: int
    excess_ns: int
    who: set[str]


class Seen(NamedTuple):
    row: int  # 0 if it was clean
    excess_ns: int
    who: frozenset[str]


class Spread:
    """By how much runs exceeded what was predicted, the last MEMORY of those that were nobody's fault."""

    def __init__(self) -> None:
        self._last: deque[int] = deque()
        self._ascending: list[int] = []

    def add(self, excess_ns: int) -> None:
        self._last.append(excess_ns)
        insort(self._ascending, excess_ns)
        if len(self._last) > MEMORY:
            del self._ascending[bisect_left(self._ascending, self._last.popleft())]

    @property
    def floor_ns(self) -> int:
        return self._ascending[-1 - len(self._ascending) // OFTEN] if self._ascending else 0


class Evidence:
    def __init__(self) -> None:
        self._spread = Spread()
        self._strikes: list[Strike] = []
        self._seen: deque[Seen] = deque(maxlen=MEMORY)
        self._rows = 0
        self._row: frozenset[str] | None = None  # who was in all of the row that goes on
        self._row_number = 0
        self._apart: set[str] | None = None  # the suspects that alone it is made of; None if others were slow in it
        self._is_nobodys = False

    @property
    def row(self) -> int:
        """The number of the last row."""
        return self._row_number

    def is_hidden(self, excess_ns: int) -> bool:
        """Whether a slow run exceeded its l99 by no more than runs do here."""
        return excess_ns <= self._spread.floor_ns

    def hide(self, who: frozenset[str], excess_ns: int) -> None:
        """A slow run that is hidden; it counts for how often runs are slow."""
        self._rows += 1
        self._seen.append(Seen(self._rows, excess_ns, who))

    def clear(self, who: frozenset[str], excess_ns: int) -> None:
        """A clean run of these."""
        self._row, self._is_nobodys = None, False
        self._seen.append(Seen(0, excess_ns, who))
        self._spread.add(max(0, excess_ns))
        if self._strikes:
            for strike in self._strikes:
                strike.who.difference_update(who)
            self._excuse([s for s in self._strikes if not s.who])

    def strike(
        self, who: frozenset[str], excess_ns: int, now_ns: int, watched: Collection[str], apart: bool = False
    ) -> bool:
        """A slow run of these, `apart` if of one suspect alone; false if it is nobody's fault. What is said of who is
        `watched` is kept for longer."""
        if self._row is None:
            self._rows += 1
            self._row, self._row_number, self._apart = who, self._rows, set()
        self._row &= who
        self._apart = self._apart | who if apart and self._apart is not None else None
        if not self._row and not self._is_nobodys and (self._apart is None or self._is_most(self._apart)):
            self._is_nobodys = True
            self._spread.add(excess_ns)
            self._excuse([s for s in self._strikes if s.row == self._row_number])
        has_others = any(not who & run.who for run in self._seen) or len(who) > 1
        self._seen.append(Seen(self._row_number, excess_ns, who))
        if self._is_nobodys or not has_others:
            return False
        kept = [s for s in self._strikes if now_ns - s.at_ns < WINDOW_NS or not s.who.isdisjoint(watched)]
        self._strikes = [*kept[-MEMORY:], Strike(now_ns, self._row_number, excess_ns, set(who))]
        return True

    def _is_most(self, tenants: set[str]) -> bool:
        return 2 * len(tenants) > len(tenants.union(*(run.who for run in self._seen)))

    def _excuse(self, strikes: list[Strike]) -> None:
        """They were nobody's; a row counts once."""
        if not strikes:
            return
        gone = {id(strike) for strike in strikes}
        self._strikes = [s for s in self._strikes if id(s) not in gone]
        for row in {s.row for s in strikes}.difference(s.row for s in self._strikes):
            self._spread.add(max(s.excess_ns for s in strikes if s.row == row))

    def common(self, who: Iterable[str]) -> set[str]:
        """Whom the last run, a slow one of these, has in common with slow ones before; nobody if it is the first."""
        common = set(who)
        for strike in self._strikes[:-1]:
            common = common & strike.who or common
        return common if any(common <= strike.who for strike in self._strikes[:-1]) else set()

    def is_against(self, tenant: str) -> bool:
        return any(tenant in strike.who for strike in self._strikes)

    def convicts(self, tenant: str, record: int) -> bool:
        """Whether it is guilty; `record` rows are known of it from before."""
        own = {s.row: s.excess_ns for s in self._strikes if tenant in s.who}
        rows = record + len(own)
        if rows < ROWS:
            return False
        others = [run for run in self._seen if tenant not in run.who or run.row not in own]
        slow = {run.row: run.excess_ns for run in others if run.row}
        if rows < ROWS_ALIKE and any(ns >= min(own.values()) for ns in slow.values()):
            return False
        return rows * math.log2((len(others) + PRIOR_RUNS) / (len(slow) + PRIOR_ROWS)) >= DOUBT_BITS

    def settle(self, guilty: str) -> None:
        """What somebody was the reason for is held against nobody else, and says nothing of the device."""
        self._strikes = [s for s in self._strikes if guilty not in s.who]
        innocent = [run for run in self._seen if not run.row or guilty not in run.who]
        self._seen = deque(innocent, MEMORY)

    def forget(self, tenant: str) -> None:
        """It has gone; another one may come under its name."""
        if self._row is not None:
            self._row -= {tenant}
        if self._apart is not None:
            self._apart.discard(tenant)
        for strike in self._strikes:
            strike.who.discard(tenant)
        self._strikes = [s for s in self._strikes if s.who]
