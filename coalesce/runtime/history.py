"""What was decided, for the last bundles and requests: the answer to "what happened to my request?"."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from coalesce.runtime.observer import Finished, Observer, Recorded
from coalesce.runtime.ticket import Ending, Ticket
from coalesce.scheduler.catalog import text_of
from coalesce.scheduler.commands import Reason
from coalesce.scheduler.request import Request

KEPT = 4096  # requests, and bundles


class Ended(NamedTuple):
    request: Request
    bundles: tuple[int, ...]  # that it was a lane of
    outcome: str
    end_ns: int


class History(Observer):
    def __init__(self) -> None:
        self._bundles: OrderedDict[int, Recorded] = OrderedDict()
        self._requests: OrderedDict[int, Ended] = OrderedDict()
        self._lock = threading.Lock()

    def finished(self, bundle: Finished) -> None:
        with self._lock:
            self._bundles[bundle.dispatch.bundle] = bundle.record()
            trim(self._bundles)

    def ended(self, endings: Sequence[Ending], now_ns: int) -> None:
        with self._lock:
            for ending in endings:
                ticket = ending.ticket
                outcome = "ok" if now_ns <= ticket.request.deadline_ns else "late"
                self._requests[ticket.request.id] = Ended(ticket.request, tuple(ticket.bundles), outcome, now_ns)
            trim(self._requests)

    def rejected(self, ticket: Ticket, reason: Reason, now_ns: int) -> None:
        with self._lock:
            self._requests[ticket.request.id] = Ended(ticket.request, tuple(ticket.bundles), reason.value, now_ns)
            trim(self._requests)

    def bundles(self) -> list[Recorded]:
        with self._lock:
            return list(self._bundles.values())

    def requests(self) -> list[Ended]:
        with self._lock:
            return list(self._requests.values())

    def explain(self, request: int) -> str | None:
        """A line for each decision about a request that has ended, or None if it is not known (any more)."""
        with self._lock:
            ended = self._requests.get(request)
            if ended is None:
                return None
            bundles = [self._bundles[b] for b in ended.bundles if b in self._bundles]
        own, zero = ended.request, ended.request.arrival_ns

        def ms(t_ns: int) -> str:
            return f"{(t_ns - zero) / 1e6:.3f} ms"

        lines = [f"request {own.id} of tenant {own.tenant!r}: deadline {ms(own.deadline_ns)} after submit"]
        for bundle in bundles:
            dispatch, lanes = bundle.dispatch, bundle.lanes
            took = (bundle.end_ns - bundle.start_ns) / 1e6
            lines.append(
                f"  bundle {dispatch.bundle} ({text_of(bundle.form)}) with {lanes} "
                f"{'lane' if lanes == 1 else 'lanes'}{f', {dispatch.why}' if dispatch.why else ''}: began after "
                f"{ms(bundle.start_ns)}, took {took:.3f} ms; expected {dispatch.l50_ns / 1e6:.3f}, at most "
                f"{dispatch.l99_ns / 1e6:.3f}{f'; failed, {bundle.error}' if bundle.error else ''}"
            )
        return "\n".join([*lines, f"  ended after {ms(ended.end_ns)}: {ended.outcome}"])


def trim(kept: OrderedDict[Any, Any]) -> None:
    while len(kept) > KEPT:
        kept.popitem(last=False)
