"""Policies beside each other in the simulator: one setting, one policy, one row.

The device is a line, l = alpha * lanes + beta for a run, by default what ResNet-50 took in bfloat16 on an H200
(experiments/results/h200): 1.0 ms for one tenant, 2.4 ms for 16, 6.4 ms for 64. Executables have widths in powers of
two, and a run costs what its width costs. Nothing is measured: a row is the same on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from absl import app, flags

from coalesce.scheduler.baselines.clockwork import Clockwork
from coalesce.scheduler.baselines.edf import Edf
from coalesce.scheduler.baselines.fifo import Fifo
from coalesce.scheduler.baselines.packing import Packing
from coalesce.scheduler.baselines.symphony import Symphony
from coalesce.scheduler.bounds import best_rate, fused_rate, Linear, unfused_rate
from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.machine import Line, line_catalog
from coalesce.scheduler.policy import Policy
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.run import Outcome, quantile, Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival, arrive_apart
from experiments.results import FORCE, load_rows, Row, save_rows

flags.DEFINE_list("policies", None, "which policies; all unless given")
flags.DEFINE_integer("requests", 10_000, "requests a simulated cell, about", lower_bound=100)
flags.DEFINE_float("horizon_s", 4.0, "simulated seconds of a cell", lower_bound=0.1)
flags.DEFINE_integer("seed", 1, "of the first arrivals")

Cell = TypeVar("Cell", bound=Hashable)

SECOND, US = 1_000_000_000, 1_000
DEVICE = "none: simulated, nothing is measured on a device"

POLICIES: dict[str, Callable[..., Policy]] = {
    "coalescing": Coalescing,
    "symphony": Symphony,
    "symphony, tenants apart": partial(Symphony, apart=True),
    "clockwork": Clockwork,
    "clockwork, tenants apart": partial(Clockwork, apart=True),
    "EDF packing": Packing,
    "EDF packing, deferred": partial(Packing, defer=True),
    "EDF, one by one": Edf,
    "FIFO, one by one": Fifo,
}


@dataclass(frozen=True)
class Setting:
    """Tenants ask with equal shares, each with Gamma arrivals of its own; family i has every `families`-th tenant."""

    rate: float = 0.0  # of all tenants, a second
    cv: float = 1.0  # of the gaps between a tenant's requests; 1 is Poisson
    slo_scale: float = 5.0  # times of a run of one lane
    tenants: int = 16
    families: int = 1
    alpha_us: float = 85.0
    beta_us: float = 900.0
    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    spread: float = 1.05  # l99 / l50
    segments: int = 1

    @property
    def line(self) -> Line:
        return Line(round(self.alpha_us * US), round(self.beta_us * US))

    @property
    def slo_ns(self) -> int:
        return round(self.slo_scale * self.line.time(1))

    @property
    def catalog(self) -> Catalog:
        lines = {family: self.line for family in range(self.families)}
        return line_catalog(lines, self.widths, segments=self.segments, spread=self.spread)

    @property
    def members(self) -> list[Tenant]:
        return [Tenant(f"t{i}", (i % self.families,), self.slo_ns) for i in range(self.tenants)]

    @property
    def bound(self) -> float:
        """No scheduler serves more requests a second in time."""
        return best_rate(Linear(*self.line).times(self.widths), self.slo_ns)

    @property
    def fused_load(self) -> float:
        return fused_rate(Linear(*self.line), self.slo_ns)

    @property
    def unfused_load(self) -> float:
        return unfused_rate(Linear(*self.line), self.tenants, self.slo_ns)


def arrivals_of(setting: Setting, requests: int, seed: int) -> Iterator[Arrival]:
    end_ns = round(requests * SECOND / setting.rate)
    names = [tenant.name for tenant in setting.members]
    return arrive_apart(Random(seed), setting.cv, dict.fromkeys(names, setting.rate / len(names)), end_ns)


def run_policy(name: str, setting: Setting, arrivals: Iterator[Arrival], seed: int = 0) -> Run:
    return simulate(POLICIES[name](), setting.members, setting.catalog, arrivals, seed=seed)


def row_of(name: str, setting: Setting, requests: int, seed: int) -> Row:
    """What became of so many requests, about."""
    run = run_policy(name, setting, arrivals_of(setting, requests, seed), seed)
    return {"policy": name, **asdict(setting), "seed": seed, **numbers_of(run)}


def numbers_of(run: Run) -> dict[str, Any]:
    counts, latencies = run.counts(), run.latencies_ns()
    return {
        "requests": len(run.requests),
        "attainment": run.attainment(),
        "goodput": run.goodput(),
        "late": counts[Outcome.LATE],
        "refused": counts[Outcome.REFUSED],
        "dropped": counts[Outcome.DROPPED],
        "latency_p50_us": quantile(latencies, 0.5) / US if latencies else None,
        "latency_p99_us": quantile(latencies, 0.99) / US if latencies else None,
        "lanes_a_bundle": run.lanes / run.bundles if run.bundles else None,
        "busy": run.busy_ns / run.end_ns if run.end_ns else 0.0,
    }


def highest(good: Callable[[float], bool], low: float, high: float, within: float) -> float:
    """About the highest value for which something is so, which is so below it; 0 if it is not even for the lowest."""
    if not good(low):
        return 0.0
    if good(high):
        return high
    while high / low > 1 + within:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def chosen(names: Sequence[str] | None) -> list[str]:
    """Policies of a command line, in our order.

    Raises:
      app.UsageError: one is not there.
    """
    if unknown := set(names or ()) - set(POLICIES):
        raise app.UsageError(f"there is no policy {sorted(unknown)[0]!r}; there are {', '.join(POLICIES)}")
    return [name for name in POLICIES if names is None or name in names]


def policies_in(rows: Sequence[Row]) -> list[str]:
    found = {row["policy"] for row in rows}
    return [name for name in POLICIES if name in found]


def fill(
    path: Path,
    head: Mapping[str, Any],
    wanted: Sequence[Cell],
    everything: Sequence[Cell],
    cell_of: Callable[[Row], Cell],
    measure: Callable[[Cell], Row],
    again: bool = False,
) -> list[Row]:
    """Rows of a file, in the order of `everything`, those of the wanted cells that it lacks, or all `again`, made now.

    The file is written after each of them, so that a run that is stopped goes on where it was.
    """
    anew = again and set(wanted) == set(everything)
    done = {} if anew else {cell_of(row): row for row in load_rows(path, head, f"{FORCE}, of all policies")}
    missing = [cell for cell in wanted if again or cell not in done]
    for i, cell in enumerate(missing):
        print(f"\r{i + 1} of {len(missing)}: {cell}".ljust(100), end="", file=sys.stderr, flush=True)
        done[cell] = measure(cell)
        save_rows(path, head, [done[c] for c in everything if c in done])
    print(file=sys.stderr)
    return [done[cell] for cell in everything if cell in done]
