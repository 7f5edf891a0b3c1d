"""What the real runtime serves to be compared with the simulator: configurations, one after another, in slices.

Configurations of one model in as many segments share a runtime (`Hall`), so that nothing is compiled twice: each has
tenants of its own there and a policy without a memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from random import Random
from statistics import median
from typing import Any, NamedTuple

from coalesce.models import by_name
from coalesce.runtime.runtime import Runtime
from coalesce.scheduler import workloads
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.events import CatalogChanged, TenantAdded
from coalesce.scheduler.request import Request
from coalesce.scheduler.run import Decision
from coalesce.scheduler.workloads import Arrival
from experiments.configurations import Configuration
from experiments.live import Kind, Live, move_in, Seen, serve, tenants
from experiments.measured_machine import Ran
from experiments.switching import Switching

SECOND = 1_000_000_000
WIDTHS = (1, 2, 4, 8, 16)
MOST = 16  # tenants of a configuration
STAYS_S = 60.0  # the SLO of a tenant that asks for nothing, so that its family stays while others come and go
ALONE = 200  # requests
SETTLE_S = 0.05  # until the driver knows of the last bundle, whose results are out already


class Slice(NamedTuple):
    """What was served in a while."""

    start_ns: int
    log: Sequence[Decision]
    requests: Sequence[Request]
    in_time: int
    ran: Sequence[Ran]
    lanes: int


class Asked(NamedTuple):
    """What a configuration asks for, in a slice."""

    own: Configuration
    rate: float
    slice_s: float

    def arrivals(self, lives: Sequence[Live], seed: int) -> Iterable[Arrival]:
        rng = Random(f"{self.own.number} {seed}")
        names = [live.name for live in lives]
        times, end_ns = workloads.gamma(rng, self.rate, self.own.cv), round(self.slice_s * SECOND)
        return workloads.arrive(rng, times, names, end_ns, workloads.zipf(len(names), self.own.zipf))


class Hall:
    """A runtime for the configurations of one model, in as many segments."""

    def __init__(self, own: Configuration) -> None:
        self.seen, self._switch = Seen(keep_log=True), Switching(Coalescing)
        self._drawn = drawn(own.model, tuple(own.fields.items()))
        self.rt = Runtime(
            policy=self._switch, widths=WIDTHS, capacity=MOST + 1, segments=own.segments, observers=[self.seen]
        )
        move_in(self.rt, [renamed(self._drawn[-1], "stays", STAYS_S)])

    def enter(self, own: Configuration, slo_s: float) -> list[Live]:
        """Its tenants, served by a policy that knows nothing of others before."""
        lives = [renamed(live, live.name, slo_s) for live in self._drawn[: own.tenants]]
        move_in(self.rt, lives)
        told = [CatalogChanged(self.seen.catalog), *map(TenantAdded, self.seen.tenants.values())]
        self.seen.log = [Decision(event, time.monotonic_ns(), ()) for event in told]
        self._switch.change(Coalescing)
        return lives

    def leave(self, lives: Sequence[Live]) -> None:
        for live in lives:
            self.rt.remove_tenant(live.name)

    def serve(self, asked: Asked, lives: Sequence[Live], seed: int) -> Slice:
        """Equal seeds, equal arrivals."""
        seen = self.seen
        time.sleep(SETTLE_S)
        seen.clear()
        start_ns, first = time.monotonic_ns(), len(seen.log or ())
        serve(self.rt, lives, asked.arrivals(lives, seed))
        time.sleep(SETTLE_S)
        in_time = sum(outcomes["ok"] for outcomes in seen.outcomes.values())
        ran = [own._replace(at_ns=own.at_ns - start_ns) for own in seen.ran]
        return Slice(start_ns, (seen.log or [])[first:], seen.requests, in_time, ran, seen.lanes)

    def serve_in_turns(self, asked: Asked, lives: Sequence[Live], count: int) -> Iterator[tuple[bool, Slice]]:
        """(whether it is compared, the slice): one to learn from before and after each that is compared, of which
        `count` have other arrivals, each twice."""
        for turn in range(2 * count):
            yield False, self.serve(asked, lives, 2 * turn)
            yield True, self.serve(asked, lives, 4 * (turn // 2) + 1)
        yield False, self.serve(asked, lives, 4 * count)


@cache
def drawn(model: str, fields: tuple[tuple[str, Any], ...]) -> list[Live]:
    return tenants([Kind(model, by_name(model, **dict(fields)), MOST + 1, STAYS_S)])


def renamed(live: Live, name: str, slo_s: float) -> Live:
    return live._replace(name=name, kind=live.kind._replace(slo_s=slo_s))


@cache
def alone_s(model: str, fields: tuple[tuple[str, Any], ...]) -> float:
    """What a request of a model takes from submit to result, with nobody else there."""
    seen, live = Seen(), drawn(model, fields)[0]
    with Runtime(widths=[1], capacity=MOST + 1, segments=1, observers=[seen]) as rt:
        move_in(rt, [live])
        seen.clear()
        for _ in range(ALONE):
            rt.submit(live.name, *live.inputs).result(60)
    return median(seen.latencies_ns[live.name]) / SECOND
