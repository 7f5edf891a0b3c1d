"""OpenTelemetry spans: one for each request, with its bundles as children.

    with Spans(provider) as spans, Runtime(observers=[spans]) as rt:
        with tracer.start_as_current_span("handle"):    # becomes the parent of the request's span
            rt.submit("a", x)

    coalesce.request         submit to end: tenant, deadline, outcome
      coalesce.bundle        on the device: which one, with how many lanes, and how long it was expected to take

What a request waits is what its bundles do not cover. A bundle stands below each request that was a lane of it. Spans
are made on a thread of their own, when a request has ended.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import copy
from typing import NamedTuple

try:
    from opentelemetry import context as contexts
    from opentelemetry.context import Context
    from opentelemetry.trace import (
        get_tracer_provider,
        set_span_in_context,
        SpanKind,
        Status,
        StatusCode,
        TracerProvider,
    )
except ImportError as e:
    raise ImportError("spans need OpenTelemetry: pip install 'coalesce-jax[spans]'") from e

from coalesce.observing.aside import Aside
from coalesce.runtime.observer import Finished, Recorded
from coalesce.runtime.ticket import Ending, Ticket
from coalesce.scheduler.catalog import text_of
from coalesce.scheduler.commands import Reason
from coalesce.scheduler.request import Request

KEPT = 4096  # bundles, for the requests in them that have not ended


class Sent(NamedTuple):
    request: int
    context: Context


class Ran(NamedTuple):
    device: int
    bundle: Recorded


class Ended(NamedTuple):
    device: int
    request: Request
    bundles: tuple[int, ...]
    outcome: str
    end_ns: int
    failed: bool


class Spans(Aside):
    """Spans go to `provider`, or to that of the process. `clock` is the runtime's."""

    def __init__(
        self,
        provider: TracerProvider | None = None,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        most: int = 100_000,
    ) -> None:
        self._tracer = (provider or get_tracer_provider()).get_tracer("coalesce")
        self._epoch_ns = time.time_ns() - clock()  # spans are in time of day
        self._contexts: OrderedDict[int, Context] = OrderedDict()
        self._bundles: OrderedDict[tuple[int, int], Ran] = OrderedDict()
        self._device = 0
        super().__init__(most)

    def on(self, device: int) -> Spans:
        own = copy(self)
        own._device = device
        return own

    # What the runtime tells

    def sent(self, ticket: Ticket) -> None:
        self.put(Sent(ticket.request.id, contexts.get_current()))

    def finished(self, bundle: Finished) -> None:
        self.put(Ran(self._device, bundle.record()))

    def ended(self, endings: Sequence[Ending], now_ns: int) -> None:
        for ending in endings:
            outcome = "ok" if now_ns <= ending.ticket.request.deadline_ns else "late"
            self._end(ending.ticket, outcome, now_ns, False)

    def rejected(self, ticket: Ticket, reason: Reason, now_ns: int) -> None:
        self._end(ticket, reason.name.lower(), now_ns, reason is not Reason.CANCELLED)

    def _end(self, ticket: Ticket, outcome: str, now_ns: int, failed: bool) -> None:
        self.put(Ended(self._device, ticket.request, tuple(ticket.bundles), outcome, now_ns, failed))

    # On its own thread

    def handle(self, item: Sent | Ran | Ended) -> None:
        if isinstance(item, Sent):
            self._contexts[item.request] = item.context
            if len(self._contexts) > 2 * self._most:  # of requests whose end was dropped
                self._contexts.popitem(last=False)
        elif isinstance(item, Ran):
            self._bundles[item.device, item.bundle.dispatch.bundle] = item
            if len(self._bundles) > KEPT:
                self._bundles.popitem(last=False)
        else:
            self._make(item)

    def _make(self, ended: Ended) -> None:
        request = ended.request
        span = self._tracer.start_span(
            "coalesce.request",
            context=self._contexts.pop(request.id, None) or Context(),
            kind=SpanKind.INTERNAL,
            attributes={
                "coalesce.tenant": request.tenant,
                "coalesce.request": request.id,
                "coalesce.deadline_ms": (request.deadline_ns - request.arrival_ns) / 1e6,
                "coalesce.priority": request.priority,
                "coalesce.outcome": ended.outcome,
            },
            start_time=self._epoch_ns + request.arrival_ns,
        )
        inside = set_span_in_context(span)
        for bundle in ended.bundles:
            ran = self._bundles.get((ended.device, bundle))
            if ran is not None:
                self._make_bundle(ran, inside)
        if ended.failed:
            span.set_status(Status(StatusCode.ERROR, ended.outcome))
        span.end(self._epoch_ns + ended.end_ns)

    def _make_bundle(self, ran: Ran, inside: Context) -> None:
        bundle, dispatch = ran.bundle, ran.bundle.dispatch
        span = self._tracer.start_span(
            "coalesce.bundle",
            context=inside,
            attributes={
                "coalesce.device": ran.device,
                "coalesce.bundle": dispatch.bundle,
                "coalesce.executable": text_of(bundle.form),
                "coalesce.lanes": bundle.lanes,
                "coalesce.width": bundle.width,
                "coalesce.why": dispatch.why,
                "coalesce.expected_ms": dispatch.l50_ns / 1e6,
                "coalesce.expected_at_most_ms": dispatch.l99_ns / 1e6,
            },
            start_time=self._epoch_ns + bundle.start_ns,
        )
        if bundle.error:
            span.set_status(Status(StatusCode.ERROR, bundle.error))
        span.end(self._epoch_ns + bundle.end_ns)
