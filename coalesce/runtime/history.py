"""What was decided, for the last bundles and requests: the answer to "what happened to my request?".

As of accounts, whoever asks takes no lock. A bundle is noted before the requests that end with it, and looked up after
them.
"""

from __future__ import annotations

import threading
from collections import deque, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from coalesce.runtime.observer import Finished, Observer, Recorded
from coalesce.runtime.ticket import Ending, Ticket
from coalesce.scheduler.catalog import text_of
from coalesce.scheduler.commands import Reason
from coalesce.scheduler.request import Request

KEPT = 4096  # requests, and bundles


class Ended(NamedTuple):
    request: Request
    bundles: Sequence[int]  # that it was a lane of
    outcome: str
    end_ns: int


class Together(NamedTuple):
    """Requests that ended at once; what each came to is looked up when somebody asks."""

    requests: Sequence[tuple[Request, Sequence[int]]]  # with the bundles that it was a lane of
    reason: Reason | None  # None for results
    end_ns: int

    def each(self) -> Iterator[Ended]:
        for request, bundles in self.requests:
            in_time = "ok" if self.end_ns <= request.deadline_ns else "late"
            outcome = in_time if self.reason is None else self.reason.value
            if self.reason is Reason.EXPIRED and request.deadline_ns <= request.arrival_ns:
                outcome = "its deadline had passed before submit"
            yield Ended(request, bundles, outcome, self.end_ns)


class History(Observer):
    def __init__(self) -> None:
        self._bundles: OrderedDict[int, Recorded] = OrderedDict()
        self._lots: deque[Together] = deque()
        self._count = 0  # requests in them
        self._newest = -1  # bundle: they end in the order of their numbers
        self._lock = threading.RLock()  # of those who note something, on threads of the runtime unless it has ended

    def finished(self, bundle: Finished) -> None:
        with self._lock:
            self._newest = bundle.dispatch.bundle
            self._bundles[self._newest] = bundle.record()
            if len(self._bundles) > KEPT:
                self._bundles.popitem(last=False)

    def ended(self, endings: Sequence[Ending], now_ns: int) -> None:
        self._keep(Together([(own.ticket.request, own.ticket.bundles) for own in endings], None, now_ns))

    def rejected(self, ticket: Ticket, reason: Reason, now_ns: int) -> None:
        self.rejected_together({ticket: reason}, now_ns)

    def rejected_together(self, stopped: Mapping[Ticket, Reason], now_ns: int) -> None:
        for reason in set(stopped.values()):
            own = [(ticket.request, ticket.bundles) for ticket, why in stopped.items() if why is reason]
            self._keep(Together(own, reason, now_ns))

    def _keep(self, lot: Together) -> None:
        """And of those before it as many as it takes."""
        with self._lock:
            self._lots.append(lot)
            self._count += len(lot.requests)
            while self._count - len(self._lots[0].requests) >= KEPT:
                self._count -= len(self._lots.popleft().requests)

    def bundles(self) -> list[Recorded]:
        return list(self._bundles.copy().values())

    def requests(self) -> list[Ended]:
        return [ended for lot in self._lots.copy() for ended in lot.each()][-KEPT:]

    def explain(self, request: int, ticket: Ticket | None = None, now_ns: int = 0) -> str | None:
        """A line for each decision about a request that has ended, or so far about who has the ticket, and was in the
        book a moment ago; None if it is not known (any more)."""
        found = (own for lot in reversed(self._lots.copy()) for own in lot.each() if own.request.id == request)
        ended = next(found, None)
        if ended is not None:
            lines = [f"  ended after {ms(ended.request, ended.end_ns)}: {ended.outcome}"]
            return "\n".join([*self._way(ended.request, ended.bundles), *lines])
        if ticket is None:
            return None
        bundles, newest = list(ticket.bundles), self._newest
        if not bundles:
            now = "it waits"
        elif bundles[-1] > newest:
            now = f"it is in bundle {bundles[-1]}, which has not ended"
        else:
            now = f"bundle {bundles[-1]} has ended: it waits for what is next, or its result is on its way"
        return "\n".join([*self._way(ticket.request, bundles), f"  after {ms(ticket.request, now_ns)} {now}"])

    def _way(self, request: Request, bundles: Sequence[int]) -> Iterator[str]:
        """What it asked for, and the bundles that are done, of those that are remembered."""
        due = ms(request, request.deadline_ns)
        yield f"request {request.id} of tenant {request.tenant!r}: deadline {due} after submit"
        for bundle in filter(None, map(self._bundles.get, bundles)):
            dispatch, lanes = bundle.dispatch, bundle.lanes
            took = (bundle.end_ns - bundle.start_ns) / 1e6
            yield (
                f"  bundle {dispatch.bundle} ({text_of(bundle.form)}) with {lanes} "
                f"{'lane' if lanes == 1 else 'lanes'}{f', {dispatch.why}' if dispatch.why else ''}: began after "
                f"{ms(request, bundle.start_ns)}, took {took:.3f} ms; expected {dispatch.l50_ns / 1e6:.3f}, at most "
                f"{dispatch.l99_ns / 1e6:.3f}{f'; failed, {bundle.error}' if bundle.error else ''}"
            )


def ms(request: Request, t_ns: int) -> str:
    """Since it was submitted."""
    return f"{(t_ns - request.arrival_ns) / 1e6:.3f} ms"
