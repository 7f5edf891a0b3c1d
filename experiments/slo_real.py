"""The part of slo_attainment that serves: tenants of one model or several, the runtime under one policy after another.

The SLO is a multiple of the time alone: of the tenant's jitted function, on the device; or of a request in the idle
runtime, where the model is so small that the runtime's own time counts (the default on a CPU).
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice, product
from typing import Any

import jax
import numpy as np

from coalesce.runtime.observer import Observer
from coalesce.runtime.runtime import Runtime
from coalesce.scheduler.bounds import best_rate, shared_rate, Times
from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.commands import Command, Reject
from coalesce.scheduler.events import CatalogChanged, Event, Submitted
from coalesce.scheduler.latency import FEW
from experiments.cells import tenants_of
from experiments.live import settle
from experiments.simulated import POLICIES
from experiments.slo_probe import Counts
from experiments.switching import Switching, SwitchingElsewhere

FIRST = "FIFO, one by one"  # the policy while tenants move in
ELSEWHERE = "coalescing, elsewhere"  # that of the first name, in a process of its own
PATIENT_S = 60.0
START_S = 900.0
KNOWN = FEW + 1  # runs


@dataclass(frozen=True)
class Kind:
    """A model that tenants have, and how urgent they are."""

    name: str
    fields: dict[str, Any]
    model: Any  # of coalesce.models
    alone_ns: int
    slo_ns: int


@dataclass(frozen=True)
class Owned:
    """A tenant."""

    name: str
    kind: Kind
    params: Any
    inputs: tuple[np.ndarray, ...]  # of its requests


def owners(kinds: Sequence[Kind], count: int) -> list[Owned]:
    """Tenants have one kind after the other."""
    drawn = [tenants_of(kind.model, len(range(i, count, len(kinds))), batch=1) for i, kind in enumerate(kinds)]
    found = []
    for i in range(count):
        made, at = drawn[i % len(kinds)], i // len(kinds)
        inputs = tuple(np.asarray(x) for x in made.inputs[at])
        found.append(Owned(f"t{i}", kinds[i % len(kinds)], made.params[at], inputs))
    return found


class Offered(Observer):
    """The catalog, as the policy is told it, and how many requests it refused at submit, or dropped afterwards."""

    def __init__(self) -> None:
        self.catalog = Catalog()
        self.refused = self.dropped = 0

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        if isinstance(event, CatalogChanged):
            self.catalog = event.catalog
        for command in commands:
            if isinstance(command, Reject):
                at_once = isinstance(event, Submitted) and event.requests[0].id <= command.request
                self.refused += at_once
                self.dropped += not at_once

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


class Service:
    """The runtime, as a probe sees it. Whoever is its `policy` serves each probe anew, without a memory of the last."""

    def __init__(
        self,
        runtime: Runtime,
        switch: Switching | SwitchingElsewhere,
        offered: Offered,
        owned: Sequence[Owned],
        widths: Sequence[int],
    ) -> None:
        self.policy = FIRST
        self.runtime, self.offered = runtime, offered
        self.slo_ns: Mapping[str, int] = {own.name: own.kind.slo_ns for own in owned}
        self._switch, self._owned, self._widths = switch, owned, [w for w in widths if w <= 2 * len(owned)]
        self._inputs = {own.name: own.inputs for own in owned}

    def begin(self) -> None:
        """A policy that knows how long executables take with requests in them, which the warm-up did not have."""
        self.drain()
        self._switch.change(POLICIES[self.policy.removesuffix(", elsewhere")])
        widths = self._widths[:1] if is_single(self.policy) else self._widths
        alike: dict[str, list[str]] = {}
        for own in self._owned:
            alike.setdefault(own.kind.name, []).append(own.name)
        for width, names, _ in product(widths, alike.values(), range(KNOWN)):
            if width > 2 * len(names):  # there is no executable for so many, and none is to be made now
                continue
            together = list(islice(cycle(names), width))
            for reply in [self.runtime.submit(name, *self._inputs[name], deadline=PATIENT_S) for name in together]:
                reply.result(PATIENT_S)

    def submit(self, tenant: str) -> Any:
        return self.runtime.submit(tenant, *self._inputs[tenant])

    def drain(self) -> None:
        if not self.runtime.drain(PATIENT_S):
            raise RuntimeError(f"requests have not ended after {PATIENT_S:g} s: {self.runtime.health()}")

    def counts(self) -> Counts:
        stats = self.runtime.stats()
        return Counts(stats.bundles, stats.lanes, stats.device_s, self.offered.refused, self.offered.dropped)

    def bound(self, most: int | None = None) -> float:
        """No scheduler serves more a second in time, with the executables that there are, or those of `most` lanes."""
        kinds = list({own.kind.name: own.kind for own in self._owned}.values())
        each = [widths_up_to(times, most) for times in self.offered.times()]
        shares = Counter(own.kind.name for own in self._owned)
        rates = [best_rate(times, kind.slo_ns) for times, kind in zip(each, kinds, strict=True)]
        return shared_rate([shares[kind.name] / len(self._owned) for kind in kinds], rates)


def is_single(policy: str) -> bool:
    return policy.endswith("one by one")


def widths_up_to(times: Times, most: int | None) -> Times:
    return {width: ns for width, ns in times.items() if most is None or width <= most}


@contextmanager
def serving(
    owned: Sequence[Owned],
    widths: Sequence[int],
    start_s: float = START_S,
    segments: int | None = None,
    mixed: bool = True,
    elsewhere: bool = False,
) -> Iterator[Service]:
    """With room for all tenants at once, so that no executable is made twice; they are waited for `start_s`. Unless
    `mixed` no executables of several families are made. Policies may think `elsewhere`, in a process of their own."""
    offered, policy = Offered(), (SwitchingElsewhere if elsewhere else Switching)(POLICIES[FIRST], mixed)
    capacity = max(Counter(own.kind.name for own in owned).values())
    options = {"widths": widths, "capacity": capacity, "segments": segments}
    with Runtime(policy=policy, observers=[offered], **options) as rt:
        for own in owned:
            rt.add_tenant(own.name, own.kind.model.apply, own.params, example=own.inputs, slo=own.kind.slo_ns / 1e9)
        rt.warm_up(start_s)
        if segments is None and len({own.kind.name for own in owned}) > 1:  # some may be cut for others
            settle(rt, lambda: offered.catalog, most_s=start_s)
        yield Service(rt, policy, offered, owned, widths)


def time_alone_ns(name: str, model: Any, whose: str, rounds: int = 50) -> int:
    """The median, of a jitted program or of a request that is alone in the runtime."""
    if whose == "request":
        (only,) = owners([Kind(name, {}, model, 0, round(PATIENT_S * 1e9))], 1)
        with serving([only], [1]) as service:
            return median_ns(lambda: service.submit(only.name).result(), rounds)
    made = tenants_of(model, 1, batch=1)
    apply, params, inputs = jax.jit(model.apply), made.params[0], made.inputs[0]
    return median_ns(lambda: jax.block_until_ready(apply(params, *inputs)), rounds)


def median_ns(run: Callable[[], Any], rounds: int) -> int:
    times = []
    for _ in range(rounds + 5):
        begun = time.monotonic_ns()
        run()
        times.append(time.monotonic_ns() - begun)
    return round(statistics.median(times[5:]))
