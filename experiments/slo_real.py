"""The part of slo_attainment that serves: one model, many tenants, the runtime under one policy after the other.

A thread of this process submits requests at the times that a Gamma process says, whatever became of those before; a
request is in time if its result was there, for who waits for it, within the SLO from submit. What was refused is not.
The SLO is a multiple of the time alone: of the tenant's jitted function, on the device; or of a request in the idle
runtime, where the model is so small that the runtime's own time counts (the default on a CPU).
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import jax
import numpy as np

from coalesce.errors import DeadlineExceeded, QueueFull
from coalesce.runtime.observer import Observer
from coalesce.runtime.runtime import Runtime
from coalesce.scheduler.bounds import best_rate
from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import CatalogChanged, Event
from coalesce.scheduler.workloads import Arrival, arrive_apart
from experiments.simulated import POLICIES

NAP_NS = 60_000  # a sleep that is shorter takes as long


class Offered(Observer):
    """The catalog, as the policy is told it."""

    def __init__(self) -> None:
        self.catalog = Catalog()

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        if isinstance(event, CatalogChanged):
            self.catalog = event.catalog

    def times(self) -> dict[int, int]:
        """Of the executables of one family: all tenants have the same program."""
        return {e.entries[0].width: e.l50_ns for e in self.catalog.executables if len(e.entries) == 1}


@dataclass(frozen=True)
class Service:
    runtime: Runtime
    offered: Offered
    inputs: dict[str, tuple[np.ndarray, ...]]  # of each tenant a request
    slo_ns: int


@contextmanager
def serving(policy: str, model: Any, tenants: int, slo_ns: int, widths: Sequence[int]) -> Iterator[Service]:
    offered = Offered()
    with Runtime(policy=POLICIES[policy](), widths=widths, observers=[offered]) as rt:
        inputs = {}
        for i in range(tenants):
            example = tuple(np.asarray(x) for x in model.example(jax.random.key(1000 + i)))
            rt.add_tenant(f"t{i}", model.apply, model.init(jax.random.key(i)), example=example, slo=slo_ns / 1e9)
            inputs[f"t{i}"] = example
        rt.warm_up()
        service = Service(rt, offered, inputs, slo_ns)
        for name in inputs:  # once each, with time enough
            rt.submit(name, *inputs[name], deadline=60.0).result()
        yield service


def time_alone_ns(model: Any, whose: str, widths: Sequence[int], rounds: int = 50) -> int:
    """The median, of a jitted program or of a request that is alone in the runtime."""
    if whose == "request":
        with serving("FIFO, one by one", model, 1, 60_000_000_000, widths[:1]) as service:
            (name,) = service.inputs
            run = lambda: service.runtime.submit(name, *service.inputs[name]).result()  # noqa: E731
            return median_ns(run, rounds)
    apply, params = jax.jit(model.apply), model.init(jax.random.key(0))
    inputs = model.example(jax.random.key(1))
    return median_ns(lambda: jax.block_until_ready(apply(params, *inputs)), rounds)


def median_ns(run: Any, rounds: int) -> int:
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
    latencies = sorted(end - begin for begin, end in zip(submitted_ns, tally.ends_ns, strict=True) if end)
    behind = sorted(at - begun_ns - a.time_ns for at, a in zip(submitted_ns, arrivals, strict=True))
    in_time = sum(latency <= service.slo_ns for latency in latencies)
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
    return best_rate(service.offered.times(), service.slo_ns)
