"""Tenants on a real runtime under arrivals, for the experiments that serve: who they are, a client, and what it saw.

The client is open: it sends each request when its time has come, whatever became of those before. What became of
requests is learnt from an observer, which costs less than a callback a request.
"""

from __future__ import annotations

import ast
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np

from coalesce.errors import CoalesceError
from coalesce.models import by_name, Model
from coalesce.runtime.observer import Finished, Observer
from coalesce.runtime.runtime import Runtime
from coalesce.runtime.ticket import Ending, Ticket
from coalesce.scheduler import workloads
from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.commands import Command, Dispatch, Reason
from coalesce.scheduler.events import CatalogChanged, Event, Submitted, TenantAdded, TenantRemoved
from coalesce.scheduler.request import Request, Tenant
from coalesce.scheduler.run import Decision
from coalesce.scheduler.workloads import Arrival
from experiments.cells import tenants_of
from experiments.measured_machine import Ran

SECOND = 1_000_000_000


class Kind(NamedTuple):
    """Tenants of one model, alike but for their weights."""

    text: str
    model: Model
    count: int
    slo_s: float


class Live(NamedTuple):
    """One tenant."""

    name: str
    kind: Kind
    params: Any
    inputs: tuple[np.ndarray, ...]


def read_kind(text: str) -> Kind:
    """`MODEL[.FIELD=VALUE[;FIELD=VALUE]]:COUNT:SLO_MS`, as in `mlp.width=64;layers=4:6:50`."""
    try:
        what, count, slo_ms = text.rsplit(":", 2)
        model, _, own = what.partition(".")
        pairs = (field.split("=", 1) for field in own.split(";") if field)
        fields = {field: ast.literal_eval(value) for field, value in pairs}
        if int(count) < 1 or not 0 < float(slo_ms) < float("inf"):
            raise ValueError("a COUNT is at least 1, an SLO_MS above 0")
        return Kind(what, by_name(model, **fields), int(count), float(slo_ms) / 1e3)
    except (ValueError, SyntaxError, TypeError) as e:
        raise SystemExit(f"{text!r}: {e}; give MODEL[.FIELD=VALUE]:COUNT:SLO_MS, as in mlp.width=64:6:50") from None


def tenants(kinds: Sequence[Kind]) -> list[Live]:
    found = []
    for kind in kinds:
        made = tenants_of(kind.model, kind.count, batch=1)
        for params, inputs in zip(made.params, made.inputs, strict=True):
            name = f"{kind.text.partition('.')[0]}-{len(found)}"
            found.append(Live(name, kind, params, tuple(np.asarray(x) for x in inputs)))
    return found


def move_in(rt: Runtime, lives: Iterable[Live], timeout_s: float = 600.0) -> None:
    """Adds tenants, and waits for their executables."""
    for live in lives:
        rt.add_tenant(live.name, live.kind.model.apply, live.params, example=live.inputs, slo=live.kind.slo_s)
    rt.warm_up(timeout_s)


def settle(rt: Runtime, offered: Callable[[], Catalog], quiet_s: float = 3.0, most_s: float = 300.0) -> None:
    """Until no program is being cut any more: what is offered has not changed for a while."""
    end_s, since_s, known = time.monotonic() + most_s, time.monotonic(), offered()
    while time.monotonic() < min(end_s, since_s + quiet_s):
        time.sleep(0.1)
        rt.warm_up(most_s)
        if offered() is not known:
            since_s, known = time.monotonic(), offered()


def times_of(process: str, rng: Random, rate: float, cv: float) -> Iterable[int]:
    """Endless times in nanoseconds."""
    if process == "poisson":
        return workloads.poisson(rng, rate)
    if process == "gamma":
        return workloads.gamma(rng, rate, cv)
    if process == "bursts":  # a tenth of the time at five times the rate of the rest
        calm = rate / 1.4
        return workloads.mmpp(rng, (calm, 5 * calm), (0.9, 0.1))
    if process == "diurnal":
        return workloads.diurnal(rng, rate, 0.8, 10.0)
    raise ValueError(f"no arrival process is called {process!r}")


PROCESSES = ("poisson", "gamma", "bursts", "diurnal")


class Client:
    """Sends requests at their times, from a thread; `refused` counts what submit itself refused."""

    def __init__(self, rt: Runtime, lives: Sequence[Live], arrivals: Iterable[Arrival]) -> None:
        self._rt, self._inputs = rt, {live.name: live.inputs for live in lives}
        self._arrivals = arrivals
        self.sent = 0
        self.refused = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="client", daemon=True)

    def _loop(self) -> None:
        begin_ns = time.monotonic_ns()
        for arrival in self._arrivals:
            wait_s = (begin_ns + arrival.time_ns - time.monotonic_ns()) / 1e9
            if wait_s > 0 and self._stop.wait(wait_s) or self._stop.is_set():
                return
            deadline = None if arrival.allowed_ns is None else arrival.allowed_ns / 1e9
            try:
                self._rt.submit(arrival.tenant, *self._inputs[arrival.tenant], deadline=deadline)
                self.sent += 1
            except CoalesceError:
                self.refused += 1

    def start(self) -> None:
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def join(self) -> None:
        self._thread.join()


class Seen(Observer):
    """What became of requests, and how long things took; `clear` forgets the past, not the tenants and executables."""

    def __init__(self, keep_log: bool = False) -> None:
        self.catalog = Catalog()
        self.tenants: dict[str, Tenant] = {}
        self.log: list[Decision] | None = [] if keep_log else None  # of everything, never cleared
        self._dispatched_ns: dict[int, int] = {}
        self.clear()

    def clear(self) -> None:
        self.requests: list[Request] = []
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)  # by tenant
        self.latencies_ns: dict[str, list[int]] = defaultdict(list)
        self.ran: list[Ran] = []
        self.lanes = self.room = self.bundles = self.busy_ns = 0

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        if self.log is not None:
            self.log.append(Decision(event, now_ns, commands))
        if isinstance(event, Submitted):
            self.requests += event.requests
        elif isinstance(event, CatalogChanged):
            self.catalog = event.catalog
        elif isinstance(event, TenantAdded):
            self.tenants[event.tenant.name] = event.tenant
        elif isinstance(event, TenantRemoved):
            self.tenants.pop(event.name, None)
        for command in commands:
            if isinstance(command, Dispatch):
                self._dispatched_ns[command.bundle] = now_ns

    def rejected(self, ticket: Ticket, reason: Reason, now_ns: int) -> None:
        self.outcomes[ticket.request.tenant][reason.name.lower()] += 1

    def finished(self, bundle: Finished) -> None:
        self.bundles += 1
        self.lanes += bundle.lanes
        self.room += bundle.width
        self.busy_ns += bundle.took_ns
        begun_ns = self._dispatched_ns.pop(bundle.dispatch.bundle, bundle.start_ns)
        self.ran.append(Ran(bundle.form, bundle.start_ns > begun_ns, bundle.took_ns, bundle.start_ns))

    def ended(self, endings: Sequence[Ending], now_ns: int) -> None:
        for ending in endings:
            request = ending.ticket.request
            self.outcomes[request.tenant]["ok" if now_ns <= request.deadline_ns else "late"] += 1
            self.latencies_ns[request.tenant].append(now_ns - request.arrival_ns)

    def attainment(self, names: Iterable[str] | None = None) -> float:
        """The share of requests with a result in time, cancelled ones apart; 1 if there are none."""
        chosen = [self.outcomes[name] for name in (self.outcomes if names is None else names)]
        asked = sum(own.total() - own["cancelled"] for own in chosen)
        return sum(own["ok"] for own in chosen) / asked if asked else 1.0


def serve(rt: Runtime, lives: Sequence[Live], arrivals: Iterable[Arrival]) -> Client:
    """Sends all of them and waits until every one has ended."""
    client = Client(rt, lives, arrivals)
    client.start()
    client.join()
    rt.drain(120.0)
    return client


def quantile_ms(latencies_ns: Sequence[int], q: float) -> float:
    ascending = sorted(latencies_ns)
    return ascending[int(q * (len(ascending) - 1) + 0.5)] / 1e6 if ascending else float("nan")
