"""What each tenant asked for, got and cost.

A bundle's time on the device is shared out by lanes: a lane costs its tenant the bundle's time over its width. What the
lanes without a request cost is padding, borne in equal parts by the lanes that were used.

Whoever asks takes no lock: a signal handler may ask, or close the runtime, while its own thread is asking, and whoever
serves waits for nobody who asks. Each count is read at once; together they are read in such an order that no request
has ended which was not submitted, and that no time on the device was given to tenants which bundles did not take.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from coalesce.runtime.account import Account, Seen, TenantStats
from coalesce.runtime.observer import Finished, Observer
from coalesce.runtime.ticket import Ending, Ticket
from coalesce.scheduler.commands import Command, Quarantine, Readmit, Reason
from coalesce.scheduler.events import Event, Submitted

APART = (Quarantine, Readmit)


@dataclass(frozen=True)
class Stats:
    tenants: Mapping[str, TenantStats]
    bundles: int
    lanes: int  # with a request, over all bundles
    device_s: float  # that bundles took


class Tenants(Mapping[str, TenantStats]):
    """Of each that was there when somebody asked; made when they are looked at, and once."""

    def __init__(self, seen: Mapping[str, Seen]) -> None:
        self._seen = seen
        self._made: dict[str, TenantStats] = {}

    def __getitem__(self, name: str) -> TenantStats:
        made = self._made.get(name)
        return self._made.setdefault(name, self._seen[name].stats()) if made is None else made

    def __iter__(self) -> Iterator[str]:
        return iter(self._seen)

    def __len__(self) -> int:
        return len(self._seen)

    def __repr__(self) -> str:
        return repr(dict(self))


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
        tenants = Tenants({name: account.seen() for name, account in self._accounts.copy().items()})
        bundles = self._bundles  # counted last, and read first
        return Stats(tenants, bundles, self._lanes, self._device_ns / 1e9)

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
                account.note_result(now_ns - arrival_ns, now_ns > deadline_ns)

    def _of(self, tenant: str) -> Account:
        """An account that was closed meanwhile is written to and forgotten."""
        return self._accounts.get(tenant) or Account()
