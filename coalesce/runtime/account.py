"""What one tenant asked for, got and cost.

    Account        is counted on
    Seen           what it was when somebody asked: the numbers alone, since many tenants are asked for at once
    TenantStats    what users see of it; quantiles are sorted for, which is left to who looks

How long requests took is only ever added at the end of an array, of which `Seen` has a part, and once it is long
another array takes its place. So nothing is copied for who asks.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from coalesce.scheduler.commands import Reason

RECENT = 1000  # latencies that the quantiles of a tenant are of


@dataclass(frozen=True)
class TenantStats:
    """Counts since the tenant was added; submitted = ok + late + rejected + cancelled + failed + pending."""

    submitted: int
    ok: int  # results by their deadline
    late: int  # results after it
    rejected: Mapping[Reason, int]
    cancelled: int
    failed: int
    pending: int
    device_s: float  # of the device's time, without padding
    padding_s: float
    latency_p50_s: float | None  # from submit to result, of the last 1,000
    latency_p99_s: float | None
    quarantined: bool
    alone: str = ""  # why it shares no bundles with others, if it does not: see `verify`

    @property
    def attainment(self) -> float | None:
        """The share of ended requests, cancelled ones apart, that got a result in time."""
        ended = self.ok + self.late + sum(self.rejected.values()) + self.failed
        return self.ok / ended if ended else None


@dataclass
class Account:
    submitted: int = 0
    ok: int = 0
    late: int = 0
    rejected: dict[Reason, int] = field(default_factory=dict)
    device_ns: float = 0.0
    padding_ns: float = 0.0
    latencies_ns: array = field(default_factory=lambda: array("q"))  # of the last requests, RECENT or more
    quarantined: bool = False
    alone: str = ""

    def note_result(self, took_ns: int, is_late: bool) -> None:
        latencies_ns = self.latencies_ns
        latencies_ns.append(took_ns)
        if len(latencies_ns) >= 2 * RECENT:
            self.latencies_ns = latencies_ns[-RECENT:]
        if is_late:
            self.late += 1
        else:
            self.ok += 1

    def seen(self) -> Seen:
        """Others may go on counting: ends are read before what was submitted, and results before how long they took,
        which is noted first."""
        ok, late, rejected = self.ok, self.late, self.rejected.copy()
        latencies_ns = self.latencies_ns
        recent = latencies_ns, len(latencies_ns)
        return Seen(
            ok, late, rejected, *recent, self.device_ns, self.padding_ns, self.submitted, self.quarantined, self.alone
        )


class Seen(NamedTuple):
    ok: int
    late: int
    rejected: dict[Reason, int]
    latencies_ns: array
    taken: int  # how many of these there were
    device_ns: float
    padding_ns: float
    submitted: int
    quarantined: bool
    alone: str

    def stats(self) -> TenantStats:
        rejected = self.rejected.copy()
        cancelled, failed = rejected.pop(Reason.CANCELLED, 0), rejected.pop(Reason.FAILED, 0)
        recent = np.sort(self.latencies_ns[max(0, self.taken - RECENT) : self.taken])
        return TenantStats(
            self.submitted,
            self.ok,
            self.late,
            MappingProxyType(rejected),
            cancelled,
            failed,
            self.submitted - self.ok - self.late - sum(self.rejected.values()),
            self.device_ns / 1e9,
            self.padding_ns / 1e9,
            quantile_s(recent, 0.5),
            quantile_s(recent, 0.99),
            self.quarantined,
            self.alone,
        )


def quantile_s(ascending_ns: Sequence[int] | np.ndarray, q: float) -> float | None:
    """The nearest-rank quantile."""
    return int(ascending_ns[int(q * (len(ascending_ns) - 1) + 0.5)]) / 1e9 if len(ascending_ns) else None
