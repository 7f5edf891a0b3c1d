"""A mixed set of tenants on one device under a chosen arrival process, live: who gets its results in time.

    python -m experiments.serve_demo
    python -m experiments.serve_demo --process=bursts --rate=1500 --duration=30
    python -m experiments.serve_demo --policy=fifo                              the same, with coalescing off
    python -m experiments.serve_demo --tenants='mlp.width=64:12:20,gru.steps=8;hidden=64;features=64:4:50'
    python -m experiments.serve_demo --process=csv --csv=arrivals.csv           times in a column TIMESTAMP

A tenant is MODEL[.FIELD=VALUE;...]:COUNT:SLO_MS. Without --rate the load is a third of what the device could do for
these tenants one request at a time. The table has the share of results in time, of everything and of the last seconds.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random

from absl import flags
from rich.console import Console
from rich.live import Live as Screen
from rich.table import Table

from coalesce.observing.trace import Trace
from coalesce.runtime.account import TenantStats
from coalesce.runtime.runtime import Runtime
from coalesce.scheduler import workloads
from coalesce.scheduler.workloads import Arrival
from experiments import own_flags
from experiments.list_flags import define_counts
from experiments.live import Client, Live, move_in, PROCESSES, read_kind, Seen, tenants, times_of
from experiments.policies import POLICIES
from experiments.results import device_name, writable_file

FLAGS = flags.FlagValues()
flags.DEFINE_list(
    "tenants",
    ["mlp.width=64:8:25", "mlp.width=32;layers=12:4:10", "gru.steps=6;hidden=64;features=64;classes=10:4:60"],
    "who is served: MODEL[.FIELD=VALUE;...]:COUNT:SLO_MS",
    flag_values=FLAGS,
)
flags.DEFINE_enum("process", "poisson", [*PROCESSES, "csv"], "how requests arrive", flag_values=FLAGS)
flags.DEFINE_float("rate", None, "requests a second of all tenants together", lower_bound=0.1, flag_values=FLAGS)
flags.DEFINE_float("cv", 4.0, "how uneven the gaps of --process=gamma are", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_string("csv", None, "recorded times for --process=csv", flag_values=FLAGS)
flags.register_multi_flags_validator(
    ["process", "csv"],
    lambda given: Path(given["csv"] or "").is_file() if given["process"] == "csv" else given["csv"] is None,
    "--process=csv needs --csv=FILE, with a column TIMESTAMP, and nothing else takes one",
    flag_values=FLAGS,
)
flags.DEFINE_float("zipf", 0.5, "how unequal the tenants' rates are; 0 is equal", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_float("duration", 15.0, "seconds", lower_bound=0.1, flag_values=FLAGS)
flags.DEFINE_enum("policy", "coalescing", list(POLICIES), "who decides", flag_values=FLAGS)
define_counts("widths", [1, 2, 4, 8, 16], "lanes of executables", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of the arrivals", flag_values=FLAGS)
flags.DEFINE_string("trace", None, "a file for a trace to open in Perfetto", flag_values=FLAGS)

REFRESH_S = 0.5
LATELY_S = 5.0
COLUMNS = (
    "tenant",
    "SLO ms",
    "sent",
    "in time",
    "lately",
    "late",
    "refused",
    "p50 ms",
    "p99 ms",
    "device s",
    "padding s",
)


def rate_of(seen: Seen, lives: Sequence[Live]) -> float:
    """A third of what the device could do one request at a time."""
    alone = {e.entries[0].family: e.l50_ns for e in seen.catalog.executables if e.entries[0].width == 1}
    times = [alone[seen.tenants[live.name].families[0]] for live in lives]
    return 1e9 / 3 * len(times) / sum(times)


def arrivals_of(names: Sequence[str], rate: float) -> Iterable[Arrival]:
    rng, end_ns = Random(FLAGS.seed), round(FLAGS.duration * 1e9)
    if FLAGS.process == "csv":
        times = workloads.read_csv(Path(FLAGS.csv))
        times = workloads.scale(times, FLAGS.rate) if FLAGS.rate else times
    else:
        times = times_of(FLAGS.process, rng, rate, FLAGS.cv)
    return workloads.arrive(rng, times, names, end_ns, workloads.zipf(len(names), FLAGS.zipf))


class Lately:
    """Attainment of the last seconds, from snapshots."""

    def __init__(self) -> None:
        self._past: deque[tuple[float, Mapping[str, TenantStats]]] = deque()

    def note(self, now_s: float, tenants: Mapping[str, TenantStats]) -> None:
        self._past.append((now_s, tenants))
        while len(self._past) > 1 and self._past[1][0] < now_s - LATELY_S:
            self._past.popleft()

    def attainment(self, name: str) -> float | None:
        if len(self._past) < 2:
            return None
        before, now = (tenants[name] for _, tenants in (self._past[0], self._past[-1]))
        ended = ended_of(now) - ended_of(before)
        return (now.ok - before.ok) / ended if ended else None


def ended_of(own: TenantStats) -> int:
    """Requests that ended, cancelled ones apart."""
    return own.ok + own.late + sum(own.rejected.values()) + own.failed


def shown(lives: Sequence[Live], tenants: Mapping[str, TenantStats], lately: Lately, title: str) -> Table:
    table = Table(title=title)
    for name in COLUMNS:
        most = max(len(live.name) for live in lives) if name == "tenant" else None
        table.add_column(name, justify="left" if name == "tenant" else "right", no_wrap=True, min_width=most)
    for before, live in zip([None, *lives], lives, strict=False):
        own = tenants[live.name]
        if before is not None and before.kind != live.kind:
            table.add_section()
        table.add_row(
            live.name,
            f"{live.kind.slo_s * 1e3:g}",
            str(own.submitted),
            coloured(own.attainment),
            coloured(lately.attainment(live.name)),
            str(own.late),
            str(sum(own.rejected.values())),
            milliseconds(own.latency_p50_s),
            milliseconds(own.latency_p99_s),
            f"{own.device_s:.2f}",
            f"{own.padding_s:.2f}",
        )
    return table


def coloured(share: float | None) -> str:
    if share is None:
        return "[dim]-[/]"
    colour = "green" if share >= 0.99 else "yellow" if share >= 0.9 else "red"
    return f"[{colour}]{share:.1%}[/]"


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def main(argv: Sequence[str]) -> None:
    own_flags.parse("serve_demo", FLAGS, argv)
    console, seen = Console(width=None if sys.stdout.isatty() else 120), Seen()
    trace = Trace() if FLAGS.trace and writable_file(Path(FLAGS.trace), "--trace names another") else None
    lives = tenants([read_kind(text) for text in FLAGS.tenants])
    with Runtime(
        policy=POLICIES[FLAGS.policy](),
        widths=FLAGS.widths,
        observers=[seen, *([trace] if trace else [])],
    ) as rt:
        console.print(f"{len(lives)} tenants on a {device_name()}: tracing, compiling and warming up")
        move_in(rt, lives)
        seen.clear()
        rate = FLAGS.rate or rate_of(seen, lives)
        client = Client(rt, lives, arrivals_of([live.name for live in lives], rate))
        begin, lately = time.monotonic(), Lately()
        client.start()
        with Screen(console=console, refresh_per_second=4, transient=True) as screen:
            while not client.done:
                passed = time.monotonic() - begin
                title = f"{FLAGS.process}, {rate:,.0f} requests a second, {FLAGS.policy}: {passed:.0f} s"
                tenants_now = rt.stats().tenants
                lately.note(passed, tenants_now)
                screen.update(shown(lives, tenants_now, lately, title))
                time.sleep(REFRESH_S)
        rt.drain(60.0)
        took, stats = time.monotonic() - begin, rt.stats()
        console.print(shown(lives, stats.tenants, lately, f"{FLAGS.process}, {FLAGS.policy}: {took:.1f} s"))
        console.print(summary(seen, client, took))
    if trace is not None:
        trace.save(FLAGS.trace)
        console.print(f"trace: {FLAGS.trace}")


def summary(seen: Seen, client: Client, took_s: float) -> str:
    in_time, busy = sum(own["ok"] for own in seen.outcomes.values()), seen.busy_ns / took_s / 1e9
    return (
        f"{client.sent:,} requests, {seen.attainment():.2%} in time, {in_time / took_s:,.0f} a second; "
        f"{seen.bundles:,} bundles of {seen.lanes / max(1, seen.bundles):.2f} requests on average, "
        f"{1 - seen.lanes / max(1, seen.room):.0%} of their lanes padding, device busy {busy:.0%}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
