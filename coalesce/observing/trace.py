"""What the runtime did, in Chrome's trace format: open it in Perfetto, or in chrome://tracing.

    trace = Trace()
    with Runtime(observers=[trace]) as rt: ...
    trace.save("coalesce.json")

    driver     what the policy was told, how long it thought, and what it answered
    device     bundles, and below them their lanes, one track each, by tenant
    requests   one track a tenant: from submit to the end, with a mark at the deadline

Times are those of the runtime's clock. `coalesce.observing.overlay` lays it over a trace of jax.profiler.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

from coalesce.runtime.observer import Finished, Observer, Recorded
from coalesce.runtime.ticket import Ending, Ticket
from coalesce.scheduler.catalog import text_of
from coalesce.scheduler.commands import Command, Dispatch, Reason
from coalesce.scheduler.events import Event
from coalesce.scheduler.request import Request

REQUESTS = 1  # Chrome's "processes"; each device has two
DRIVER, DEVICE, EACH = 2, 3, 2
JsonEvent = dict[str, Any]


class Tick(NamedTuple):
    device: int
    event: Event
    commands: tuple[Command, ...]
    start_ns: int
    end_ns: int


class Ran(NamedTuple):
    device: int
    bundle: Recorded
    requests: tuple[tuple[Request, ...], ...]  # of each entry


class Ended(NamedTuple):
    request: Request
    outcome: str
    end_ns: int


class Trace(Observer):
    """Keeps the last `most` things that happened; `clock` is the runtime's."""

    def __init__(self, most: int = 200_000, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._seen: deque[Tick | Ran | Ended] = deque(maxlen=most)
        self._clock = clock
        self._device = 0

    def on(self, device: int) -> Trace:
        own = copy(self)
        own._device = device
        return own

    # What the runtime tells

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        self._seen.append(Tick(self._device, event, tuple(commands), now_ns, self._clock()))

    def finished(self, bundle: Finished) -> None:
        requests = tuple(tuple(ticket.request for ticket in tickets) for tickets in bundle.entries)
        self._seen.append(Ran(self._device, bundle.record(), requests))

    def ended(self, endings: Sequence[Ending], now_ns: int) -> None:
        for ending in endings:
            request = ending.ticket.request
            self._seen.append(Ended(request, "ok" if now_ns <= request.deadline_ns else "late", now_ns))

    def rejected(self, ticket: Ticket, reason: Reason, now_ns: int) -> None:
        self._seen.append(Ended(ticket.request, reason.value, now_ns))

    # What is read

    def events(self) -> list[JsonEvent]:
        """In Chrome's trace format."""
        tracks = Tracks()
        for seen in list(self._seen):
            if isinstance(seen, Tick):
                tracks.events.append(tick(seen, tracks))
            elif isinstance(seen, Ran):
                tracks.events += bundle(seen, tracks)
            else:
                tracks.events += life(seen, tracks)
        return [*tracks.names(), *tracks.events]

    def save(self, path: str | Path) -> None:
        text = json.dumps({"displayTimeUnit": "ms", "traceEvents": self.events()})
        Path(path).write_text(text, encoding="utf-8")


class Tracks:
    """Events, and the tracks that they lie on."""

    def __init__(self) -> None:
        self.events: list[JsonEvent] = []
        self.tenants: dict[str, int] = {}
        self.lanes: dict[int, int] = {}  # of each device

    def names(self) -> Iterator[JsonEvent]:
        yield from process_name(REQUESTS, "coalesce requests")
        for tenant, number in self.tenants.items():
            yield thread_name(REQUESTS, number, tenant)
        for device, lanes in sorted(self.lanes.items()):
            driver, own = DRIVER + EACH * device, DEVICE + EACH * device
            yield from process_name(driver, f"coalesce driver {device}")
            yield thread_name(driver, 1, "decisions")
            yield from process_name(own, f"coalesce device {device}")
            yield thread_name(own, 1, "bundles")
            for lane in range(lanes):
                yield thread_name(own, 2 + lane, f"lane {lane}")


def process_name(process: int, name: str) -> Iterator[JsonEvent]:
    yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}}


def thread_name(process: int, thread: int, name: str) -> JsonEvent:
    return {"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": name}}


def tick(seen: Tick, tracks: Tracks) -> JsonEvent:
    tracks.lanes.setdefault(seen.device, 0)
    args = {
        "device": seen.device,
        "event": str(seen.event)[:500],
        "commands": [str(command)[:200] for command in seen.commands],
        "bundles": [command.bundle for command in seen.commands if isinstance(command, Dispatch)],
    }
    return span(type(seen.event).__name__, DRIVER + EACH * seen.device, 1, seen.start_ns, seen.end_ns, args)


def bundle(seen: Ran, tracks: Tracks) -> Iterator[JsonEvent]:
    own, dispatch, process = seen.bundle, seen.bundle.dispatch, DEVICE + EACH * seen.device
    args = {
        "bundle": dispatch.bundle,
        "executable": text_of(own.form),
        "lanes": own.lanes,
        "expected_us": dispatch.l50_ns / 1e3,
        "expected_at_most_us": dispatch.l99_ns / 1e3,
        "why": dispatch.why,
        "error": own.error,
    }
    yield span(f"bundle {dispatch.bundle}: {text_of(own.form)}", process, 1, own.start_ns, own.end_ns, args)
    first = 0
    for entry, requests in zip(own.form, seen.requests, strict=True):
        for lane, request in enumerate(requests, first):
            args = {
                "request": request.id,
                "bundle": dispatch.bundle,
                "left_us": (request.deadline_ns - own.end_ns) / 1e3,
            }
            yield span(request.tenant, process, 2 + lane, own.start_ns, own.end_ns, args)
        first += entry.width
    tracks.lanes[seen.device] = max(tracks.lanes.get(seen.device, 0), first)


def life(seen: Ended, tracks: Tracks) -> Iterator[JsonEvent]:
    """A request, as an asynchronous event: those of one tenant overlap."""
    request = seen.request
    track = tracks.tenants.setdefault(request.tenant, 1 + len(tracks.tenants))
    common = {"cat": "request", "id": request.id, "pid": REQUESTS, "tid": track}
    args = {"request": request.id, "outcome": seen.outcome, "left_us": (request.deadline_ns - seen.end_ns) / 1e3}
    begin = {"ph": "b", "name": request.tenant, "ts": request.arrival_ns / 1e3, "args": args, **common}
    mark = {"ph": "n", "name": "deadline", "ts": request.deadline_ns / 1e3, **common}
    end = {"ph": "e", "name": request.tenant, "ts": seen.end_ns / 1e3, **common}
    yield from [begin, mark, end] if request.deadline_ns <= seen.end_ns else [begin, end, mark]


def span(name: str, process: int, thread: int, start_ns: int, end_ns: int, args: JsonEvent) -> JsonEvent:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": thread,
        "ts": start_ns / 1e3,
        "dur": (end_ns - start_ns) / 1e3,
        "args": args,
    }
