"""How fast the simulator is with the policy in it, and how long one decision takes.

    python -m experiments.simulator_speed --profile

Speed: requests a second of one core that are simulated, arrivals drawn before, with 1,000 tenants and nothing to do for
a device. A round is the best of --repeats: what else the machine does makes a run longer, never shorter. Decisions:
the time of every `on_event` while 5,000 requests wait or more; what takes longer than usual is a garbage collection
or somebody else's turn, so the whole distribution is given.
"""

from __future__ import annotations

import cProfile
import gc
import io
import pstats
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from absl import app, flags

from coalesce.runtime.frozen import set_aside
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import Event
from coalesce.scheduler.machine import Line, line_catalog
from coalesce.scheduler.native import is_native
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.run import quantile
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival, arrive, poisson, SECOND, zipf
from experiments.results import device_folder, device_name, header, named, Row, save_rows, table, writable

TENANTS = flags.DEFINE_integer("tenants", 1000, "tenants", lower_bound=1)
REQUESTS = flags.DEFINE_integer("requests", 200_000, "requests of a simulation", lower_bound=1000)
REPEATS = flags.DEFINE_integer("repeats", 5, "simulations, of which the fastest counts", lower_bound=1)
QUEUED = flags.DEFINE_integer("queued", 5000, "decisions count while so many requests wait", lower_bound=0)
PROFILE = flags.DEFINE_bool("profile", False, "also write where the time goes, by cProfile")
OUT = flags.DEFINE_string("out", None, "folder for the results; default experiments/results/<device>")

LINE = Line(50_000, 1_000_000)
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)
CAPACITY = WIDTHS[-1] / LINE.time(WIDTHS[-1]) * SECOND


class Load(NamedTuple):
    name: str
    families: int
    segments: int
    share: float  # of what the device can do
    slo_ms: float

    def tenants(self, count: int) -> list[Tenant]:
        return [Tenant(f"t{i}", (i % self.families,), int(self.slo_ms * 1e6)) for i in range(count)]

    def arrivals(self, requests: int, count: int) -> list[Arrival]:
        rng, rate = Random(1), self.share * CAPACITY
        names = [t.name for t in self.tenants(count)]
        return list(arrive(rng, poisson(rng, rate), names, int(requests / rate * SECOND), zipf(count, 0.5)))


SPEED = (
    Load("one family", 1, 1, 0.75, 25.0),
    Load("one family, overload", 1, 1, 3.0, 25.0),
    Load("eight families", 8, 1, 0.5, 50.0),
    Load("three segments", 1, 3, 0.75, 25.0),
)
DECISIONS = (
    Load("one family", 1, 1, 2.0, 500.0),
    Load("eight families", 8, 1, 2.0, 1000.0),
    Load("eight families in three segments", 8, 3, 2.0, 1000.0),
)


class Timed:
    """A policy whose answers are timed while so many requests wait."""

    def __init__(self, queued: int) -> None:
        self.policy = Coalescing()
        self.queued = queued
        self.times_ns: list[int] = []

    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        busy = self.policy.waiting >= self.queued
        begun_ns = time.perf_counter_ns()
        commands = self.policy.on_event(event, now_ns)
        took_ns = time.perf_counter_ns() - begun_ns
        if busy:
            self.times_ns.append(took_ns)
        return commands


def run(load: Load, policy: Coalescing | Timed, arrivals: list[Arrival]) -> float:
    """Seconds; the collector of garbage looks as seldom, and at as little, as in a process with a runtime."""
    catalog = line_catalog(dict.fromkeys(range(load.families), LINE), WIDTHS, segments=load.segments, spread=1.2)
    tenants = load.tenants(TENANTS.value)
    gc.collect()
    set_aside.begin()
    try:
        begun = time.perf_counter()
        simulate(policy, tenants, catalog, arrivals)
        return time.perf_counter() - begun
    finally:
        set_aside.end()


def measure_speed(load: Load) -> Row:
    arrivals = load.arrivals(REQUESTS.value, TENANTS.value)
    seconds = min(run(load, Coalescing(), arrivals) for _ in range(REPEATS.value))
    return {"measured": "speed", **load._asdict(), "requests": len(arrivals), "requests_per_s": len(arrivals) / seconds}


def measure_decisions(load: Load) -> Row:
    timed = Timed(QUEUED.value)
    run(load, timed, load.arrivals(REQUESTS.value, TENANTS.value))
    times = sorted(timed.times_ns)
    if not times:
        return {"measured": "decisions", **load._asdict(), "decisions": 0}
    shown = {f"p{q}_us": quantile(times, float(q) / 100) / 1e3 for q in ("50", "90", "99", "99.9")}
    return {"measured": "decisions", **load._asdict(), "decisions": len(times), **shown, "max_us": times[-1] / 1e3}


def profile(load: Load) -> str:
    profiler = cProfile.Profile()
    arrivals = load.arrivals(REQUESTS.value, TENANTS.value)
    profiler.runcall(run, load, Coalescing(), arrivals)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(30)
    lines = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
    return f"{load.name}: {len(arrivals)} requests\n" + "\n".join(lines) + "\n"


def report(rows: list[Row]) -> str:
    def describe(row: Row) -> list[str]:
        return [row["name"], f"{100 * row['share']:.0f}%", f"{row['slo_ms']:g}"]

    speed = [[*describe(r), f"{r['requests_per_s']:,.0f}"] for r in rows if r["measured"] == "speed"]
    columns = ["p50_us", "p90_us", "p99_us", "p99.9_us", "max_us"]
    decisions = [
        [*describe(r), f"{r['decisions']:,}", *(f"{r[c]:.0f}" if c in r else "-" for c in columns)]
        for r in rows
        if r["measured"] == "decisions"
    ]
    shared = ["tenants share", "load", "SLO, ms"]
    return (
        f"{table([*shared, 'requests/s'], speed)}\n\n"
        f"Decisions while {QUEUED.value:,} or more wait, in microseconds:\n\n"
        f"{table([*shared, 'decisions', 'p50', 'p90', 'p99', 'p99.9', 'max'], decisions)}\n"
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]}?")
    folder = writable(Path(OUT.value or Path(__file__).parent / "results" / device_folder()))
    given = [arg for arg in sys.argv[1:] if not arg.startswith("--out")]
    command = " ".join(["python -m experiments.simulator_speed", *given])
    rows = [*map(measure_speed, SPEED), *map(measure_decisions, DECISIONS)]
    head = header(command, device_name(), "one core", tenants=TENANTS.value, requests=REQUESTS.value)
    path = folder / named("simulator_speed")
    save_rows(path, head, rows)
    compiled = " The policy is compiled by mypyc (`make native`)." if is_native() else ""
    text = (
        f"# The simulator's speed, and the time of a decision\n\n{TENANTS.value:,} tenants, {REQUESTS.value:,} "
        f"requests, one core of {head['device']}. {head['date']}.{compiled}\n\n    {command}\n\n{report(rows)}"
    )
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    if PROFILE.value:
        profiles = "\n".join([profile(SPEED[0]), profile(DECISIONS[1])])
        path.with_name(f"{path.stem}_profile.txt").write_text(profiles, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
