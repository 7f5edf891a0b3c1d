"""What each tenant asked for, got and cost.

A bundle's time on the device is shared out by lanes: a lane costs its tenant the bundle's time over its width. What the
lanes without a request cost is padding, borne in equal parts by the lanes that were used.

Whoever asks takes no lock: a signal handler may ask, or close the runtime, while its own thread is asking, and whoever
serves waits for nobody who asks. Each count is read at once; together they are read in such an order that no request
has ended which was not submitted, and that no time on the device was given to tenants which bundles did not take.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType

from coalesce.runtime.observer import Finished, Observer
from coalesce.runtime.ticket import Ending, Ticket
from coalesce.scheduler.commands import Command, Quarantine, Readmit, Reason
from coalesce.scheduler.events import Event, Submitted

RECENT = 1000  # latencies that the quantiles of a tenant are of
APART = (Quarantine, Readmit)


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


@dataclass(frozen=True)
class Stats:
    tenants: Mapping[str, TenantStats]
    bundles: int
    lanes: int  # with a request, over all bundles
    device_s: float  # that bundles took


@dataclass
class Account:
    submitted: int = 0
    ok: int = 0
    late: int = 0
    rejected: dict[Reason, int] = field(default_factory=dict)
    device_ns: float = 0.0
    padding_ns: float = 0.0
    latencies_ns: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))
    quarantined: bool = False
    alone: str = ""

    def snapshot(self) -> TenantStats:
        """Others may go on counting: ends are read before what was submitted, and results before how long they took,
        which is noted first."""
        ok, late, rejected = self.ok, self.late, self.rejected.copy()
        ended = ok + late + sum(rejected.values())
        cancelled, failed = rejected.pop(Reason.CANCELLED, 0), rejected.pop(Reason.FAILED, 0)
        latencies = sorted(self.latencies_ns)
        submitted = self.submitted
        return TenantStats(
            submitted,
            ok,
            late,
            MappingProxyType(rejected),
            cancelled,
            failed,
            submitted - ended,
            self.device_ns / 1e9,
            self.padding_ns / 1e9,
            quantile_s(latencies, 0.5),
            quantile_s(latencies, 0.99),
            self.quarantined,
            self.alone,
        )


def quantile_s(ascending_ns: Sequence[int], q: float) -> float | None:
    """The nearest-rank quantile."""
    return ascending_ns[int(q * (len(ascending_ns) - 1) + 0.5)] / 1e9 if ascending_ns else None


class Accounts(Observer):
    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._bundles = self._lanes = self._device_ns = 0
        self._lock = threading.RLock()  # of those who count, on threads of the runtime unless it has ended

    def open(self, tenant: str, alone: str = "") -> None:
        self._accounts[tenant] = Account(alone=alone)

    def close(self, tenant: str) -> None:
        self._accounts.pop(tenant, None)

    def stats(self) -> Stats:
        tenants = {name: account.snapshot() for name, account in self._accounts.copy().items()}
        bundles = self._bundles  # counted last, and read first
        return Stats(MappingProxyType(tenants), bundles, self._lanes, self._device_ns / 1e9)

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        if isinstance(event, Submitted):
            with self._lock:
                known = self._accounts
                for request in event.requests:
                    account = known.get(request.tenant)
                    if account is not None:  # else it was closed meanwhile, as in `_of`
                        account.submitted += 1
        for command in commands:
            if isinstance(command, APART):
                with self._lock:
                    self._of(command.tenant).quarantined = isinstance(command, Quarantine)

    def rejected(self, ticket: Ticket, reason: Reason, now_ns: int) -> None:
        self.rejected_together({ticket: reason}, now_ns)

    def rejected_together(self, stopped: Mapping[Ticket, Reason], now_ns: int) -> None:
        with self._lock:
            for ticket, reason in stopped.items():
                counts = self._of(ticket.request.tenant).rejected
                counts[reason] = counts.get(reason, 0) + 1

    def finished(self, bundle: Finished) -> None:
        width, lanes = bundle.width, bundle.lanes
        each = bundle.took_ns / width
        padding = each * (width - lanes) / lanes
        with self._lock:
            self._lanes += lanes
            self._device_ns += bundle.took_ns
            self._bundles += 1
            known = self._accounts
            for ticket in chain.from_iterable(bundle.entries):
                account = known.get(ticket.request.tenant) or Account()
                account.device_ns += each
                account.padding_ns += padding

    def ended(self, endings: Sequence[Ending], now_ns: int) -> None:
        with self._lock:
            known = self._accounts
            for ending in endings:
                _, tenant, _, arrival_ns, deadline_ns, _ = ending.ticket.request
                account = known.get(tenant) or Account()
                account.latencies_ns.append(now_ns - arrival_ns)
                if now_ns <= deadline_ns:
                    account.ok += 1
                else:
                    account.late += 1

    def _of(self, tenant: str) -> Account:
        """An account that was closed meanwhile is written to and forgotten."""
        return self._accounts.get(tenant) or Account()
