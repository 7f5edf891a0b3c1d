"""Simulations that tests share: tenants of a few families on one device, with every invariant checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.invariants import Checker
from coalesce.scheduler.machine import Line, line_catalog
from coalesce.scheduler.policy import Policy
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.run import Outcome, Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival, arrive, poisson, SECOND

MS = 1_000_000
LINE = Line(50_000, 1_000_000)  # 1 ms a run and 50 us a lane
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SLO = 25 * MS


def tenants(count: int, families: int = 1, slo_ns: int = SLO, **terms: Any) -> list[Tenant]:
    return [Tenant(f"t{i}", (i % families,), slo_ns, **{"quota": 100_000, **terms}) for i in range(count)]


def catalog(
    families: int = 1, segments: int = 1, spread: float = 1.2, widths: Iterable[int] = WIDTHS, **more: Any
) -> Catalog:
    return line_catalog({f: LINE for f in range(families)}, widths, segments=segments, spread=spread, **more)


def capacity(slo_ns: int = SLO, widths: Iterable[int] = WIDTHS) -> float:
    """Requests a second that no policy exceeds."""
    return max(w / LINE.time(w) for w in widths if LINE.time(w) <= slo_ns) * SECOND


def steady(rate: float, end_ns: int, names: Sequence[str], seed: int = 1) -> list[Arrival]:
    rng = Random(seed)
    return list(arrive(rng, poisson(rng, rate), names, end_ns))


def checked(
    who: Sequence[Tenant], what: Catalog, arrivals: Iterable[Arrival], policy: Policy | None = None, **options: Any
) -> Run:
    """A run in which nothing was violated, and after which nothing is left."""
    patience_ns, watchers = options.pop("patience_ns", 4 * MS), options.pop("watchers", ())
    checker = Checker(depth=2, patience_ns=patience_ns)
    policy = policy or Coalescing()
    run = simulate(policy, who, what, arrivals, watchers=[checker.see, *watchers], **options)
    assert checker.finish()[:5] == []
    assert +checker.outcomes == run.counts()
    if "until_ns" not in options:
        assert run.counts()[Outcome.PENDING] == 0
        assert isinstance(policy, Coalescing) and policy.waiting == 0
    return run
