"""The part of slo_attainment that serves: tenants of one model or several, the runtime under one policy.

A thread of this process submits requests at the times that a Gamma process says, whatever became of those before; a
request is in time if its result was there, for who waits for it, within the SLO from submit. What was refused is not.
The SLO is a multiple of the time alone: of the tenant's jitted function, on the device; or of a request in the idle
runtime, where the model is so small that the runtime's own time counts (the default on a CPU).
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import jax
import numpy as np

from coalesce.errors import DeadlineExceeded, QueueFull
from coalesce.runtime.observer import Observer
from coalesce.runtime.runtime import Runtime
from coalesce.scheduler.bounds import best_rate, shared_rate
from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import CatalogChanged, Event
from coalesce.scheduler.workloads import Arrival, arrive_apart
from experiments.simulated import POLICIES

NAP_NS = 60_000  # a sleep that is shorter takes as long


@dataclass(frozen=True)
class Kind:
    """A model that tenants have, and how urgent they are."""

    model: Any  # of coalesce.models
    alone_ns: int
    slo_ns: int


class Offered(Observer):
    """The catalog, as the policy is told it."""

    def __init__(self) -> None:
        self.catalog = Catalog()

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        if isinstance(event, CatalogChanged):
            self.catalog = event.catalog

    def times(self) -> list[dict[int, int]]:
        """How long each width of each family takes to its end, families in the order of their first tenants."""
        found: dict[int, dict[int, list[int]]] = {}
        for executable in self.catalog.executables:
            if len(executable.entries) == 1:
                family, _, width = executable.entries[0]
                found.setdefault(family, {}).setdefault(width, []).append(executable.l50_ns)
        return [
            {width: sum(ns) for width, ns in found[family].items() if len(ns) == self.catalog.segments_of(family)}
            for family in sorted(found)
        ]


@dataclass(frozen=True)
class Service:
    """Tenants have one kind after the other."""

    runtime: Runtime
    offered: Offered
    kinds: Sequence[Kind]
    inputs: dict[str, tuple[np.ndarray, ...]]  # of each tenant a request

    def slo_ns(self, tenant: str) -> int:
        return self.kinds[list(self.inputs).index(tenant) % len(self.kinds)].slo_ns


@contextmanager
def serving(policy: str, kinds: Sequence[Kind], tenants: int, widths: Sequence[int]) -> Iterator[Service]:
    offered = Offered()
    with Runtime(policy=POLICIES[policy](), widths=widths, observers=[offered]) as rt:
        inputs = {}
        for i in range(tenants):
            kind = kinds[i % len(kinds)]
            example = tuple(np.asarray(x) for x in kind.model.example(jax.random.key(1000 + i)))
            params = kind.model.init(jax.random.key(i))
            rt.add_tenant(f"t{i}", kind.model.apply, params, example=example, slo=kind.slo_ns / 1e9)
            inputs[f"t{i}"] = example
        rt.warm_up()
        for name in inputs:  # once each, with time enough
            rt.submit(name, *inputs[name], deadline=60.0).result()
        yield Service(rt, offered, kinds, inputs)


def time_alone_ns(model: Any, whose: str, widths: Sequence[int], rounds: int = 50) -> int:
    """The median, of a jitted program or of a request that is alone in the runtime."""
    if whose == "request":
        minute = Kind(model, 0, 60_000_000_000)
        with serving("FIFO, one by one", [minute], 1, widths[:1]) as service:
            (name,) = service.inputs
            return median_ns(lambda: service.runtime.submit(name, *service.inputs[name]).result(), rounds)
    apply, params = jax.jit(model.apply), model.init(jax.random.key(0))
    inputs = model.example(jax.random.key(1))
    return median_ns(lambda: jax.block_until_ready(apply(params, *inputs)), rounds)


def median_ns(run: Callable[[], Any], rounds: int) -> int:
    times = []
    for _ in range(rounds + 5):
        begun = time.monotonic_ns()
        run()
        times.append(time.monotonic_ns() - begun)
    return round(statistics.median(times[5:]))


@dataclass
class Tally:
    """Of one probe."""

    ends_ns: list[int]
    failures: list[BaseException]

    def watch(self, reply: Any, at: int) -> None:
        def done(reply: Any) -> None:
            error = reply.exception()
            if error is None:
                self.ends_ns[at] = time.monotonic_ns()
            elif not isinstance(error, DeadlineExceeded | QueueFull):
                self.failures.append(error)

        reply.add_done_callback(done)


def probe(service: Service, rate: float, cv: float, seconds: float, seed: int) -> dict[str, Any]:
    """What becomes of requests at a rate.

    Raises:
      RuntimeError: a request failed for another reason than time.
    """
    names = list(service.inputs)
    end_ns = round(seconds * 1e9)
    arrivals = list(arrive_apart(Random(seed), cv, dict.fromkeys(names, rate / len(names)), end_ns))
    tally = Tally([0] * len(arrivals), [])
    before = service.runtime.stats()
    gc.collect()
    begun_ns, submitted_ns = submit_all(service, arrivals, tally)
    service.runtime.drain(60.0)
    if tally.failures:
        raise RuntimeError(f"{len(tally.failures)} requests failed, the first with {tally.failures[0]!r}")
    allowed_ns = {name: service.slo_ns(name) for name in names}
    took = [(end - begun, a.tenant) for begun, end, a in zip(submitted_ns, tally.ends_ns, arrivals, strict=True) if end]
    latencies = sorted(ns for ns, _ in took)
    behind = sorted(at - begun_ns - a.time_ns for at, a in zip(submitted_ns, arrivals, strict=True))
    in_time = sum(ns <= allowed_ns[tenant] for ns, tenant in took)
    after = service.runtime.stats()
    bundles = after.bundles - before.bundles
    return {
        "rate": rate,
        "cv": cv,
        "requests": len(arrivals),
        "attainment": in_time / len(arrivals) if arrivals else 1.0,
        "goodput": in_time / seconds,
        "late": len(latencies) - in_time,
        "latency_p50_us": latencies[len(latencies) // 2] / 1e3 if latencies else None,
        "latency_p99_us": latencies[int(0.99 * len(latencies))] / 1e3 if latencies else None,
        "behind_p99_us": behind[int(0.99 * len(behind))] / 1e3 if behind else 0.0,
        "lanes_a_bundle": (after.lanes - before.lanes) / bundles if bundles else None,
        "busy": (after.device_s - before.device_s) / seconds,
    }


def submit_all(service: Service, arrivals: Sequence[Arrival], tally: Tally) -> tuple[int, list[int]]:
    """(when it began, when each was submitted)"""
    submitted = []
    begun_ns = time.monotonic_ns()
    for at, arrival in enumerate(arrivals):
        early_ns = begun_ns + arrival.time_ns - time.monotonic_ns()
        if early_ns > NAP_NS:
            time.sleep((early_ns - NAP_NS) / 1e9)
        submitted.append(time.monotonic_ns())
        tally.watch(service.runtime.submit(arrival.tenant, *service.inputs[arrival.tenant]), at)
    return begun_ns, submitted


def bound_of(service: Service) -> float:
    """No scheduler serves more a second in time, with the executables that there are."""
    kinds, each = service.kinds, service.offered.times()
    shares = Counter(i % len(kinds) for i in range(len(service.inputs)))
    rates = [best_rate(times, kind.slo_ns) for times, kind in zip(each, kinds, strict=True)]
    return shared_rate([shares[i] / shares.total() for i in range(len(kinds))], rates)
