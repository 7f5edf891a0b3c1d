"""What became of the requests of a run, and of the device's time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from coalesce.scheduler.commands import Command, Reason
from coalesce.scheduler.events import Event
from coalesce.scheduler.request import Request
from coalesce.scheduler.tuples import made

SECOND = 1_000_000_000


class Outcome(Enum):
    PENDING = "pending"  # it has not ended
    OK = "ok"  # in time
    LATE = "late"  # a result, after its deadline
    REFUSED = "refused"  # at submit
    DROPPED = "dropped"  # after it was admitted, without a result
    CANCELLED = "cancelled"
    FAILED = "failed"


class Decision(NamedTuple):
    event: Event
    now_ns: int
    commands: Sequence[Command]


Watcher = Callable[[Event, int, Sequence[Command]], object]


@dataclass
class Run:
    """Lists have an element for each request, by its id; times are of the simulation's clock, which starts at 0."""

    rows: list[tuple[int, str, int, int, int, int]] = field(default_factory=list)  # what `requests` are made of
    outcomes: list[Outcome] = field(default_factory=list)
    ends_ns: list[int] = field(default_factory=list)  # when its client knew; 0 for what has not ended
    reasons: dict[int, Reason] = field(default_factory=dict)  # of those that were refused, dropped, cancelled or failed
    end_ns: int = 0  # the last event
    busy_ns: int = 0  # the device
    bundles: int = 0
    lanes: int = 0  # that ran, each time that they ran
    widths: int = 0  # of the executables that they ran in: what is more is padding
    failures: int = 0  # bundles
    decisions: int = 0
    mixed: int = 0  # bundles of several families
    log: list[Decision] = field(default_factory=list)  # if it was asked for
    _requests: list[Request] = field(default_factory=list)

    @property
    def requests(self) -> list[Request]:
        """Made when they are asked for: plain rows are nothing that a garbage collection looks at again and again."""
        self._requests += [made(Request, row) for row in self.rows[len(self._requests) :]]
        return self._requests

    def counts(
        self, tenants: Iterable[str] | None = None, since_ns: int = 0, until_ns: int = 1 << 62
    ) -> Counter[Outcome]:
        """Of requests that arrived in a span of time, of some tenants or all."""
        chosen = None if tenants is None else frozenset(tenants)
        return Counter(
            outcome
            for request, outcome in zip(self.requests, self.outcomes, strict=True)
            if since_ns <= request.arrival_ns < until_ns and (chosen is None or request.tenant in chosen)
        )

    def attainment(self, tenants: Iterable[str] | None = None, since_ns: int = 0, until_ns: int = 1 << 62) -> float:
        """The share of requests with a result in time, among all but the cancelled; 1 if there are none."""
        counts = self.counts(tenants, since_ns, until_ns)
        asked = counts.total() - counts[Outcome.CANCELLED]
        return counts[Outcome.OK] / asked if asked else 1.0

    def goodput(self, since_ns: int = 0, until_ns: int | None = None) -> float:
        """Results in time a second, of requests that arrived then; `until_ns` is the last arrival unless given."""
        if not self.requests:
            return 0.0
        until = self.requests[-1].arrival_ns if until_ns is None else until_ns
        return self.counts(None, since_ns, until)[Outcome.OK] * SECOND / max(1, until - since_ns)

    def latencies_ns(self, tenants: Iterable[str] | None = None) -> list[int]:
        """From submit to result, ascending, of all that have a result."""
        chosen = None if tenants is None else frozenset(tenants)
        return sorted(
            end_ns - request.arrival_ns
            for request, outcome, end_ns in zip(self.requests, self.outcomes, self.ends_ns, strict=True)
            if outcome in (Outcome.OK, Outcome.LATE) and (chosen is None or request.tenant in chosen)
        )


def quantile(ascending: Sequence[int], q: float) -> int:
    """The least value that a share of at least `q` does not exceed."""
    return ascending[min(len(ascending) - 1, int(q * len(ascending)))]
