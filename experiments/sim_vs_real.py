"""Claim: the simulator says what the real runtime will do: attainment within 2 points, over 20 configurations.

    python -m experiments.sim_vs_real
    python -m experiments.sim_vs_real --configurations=0,7 --duration=3

A configuration is served twice by the real runtime, with other arrivals each time. The first run measures how long
each executable takes, and how long the driver needs to decide and to be told. The simulator gets these figures, the
policy as the log of the real driver leaves it after the first run, and the arrivals of the second. Then both have the
same requests at the same times, and the share of requests in time is compared.

Configurations differ in tenants, rates, unevenness, SLOs and the number of segments, and are drawn from a seed. Load 1
is what the runtime can do one request at a time; an SLO is so many times what a request takes alone.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from random import Random
from statistics import median
from typing import Any, NamedTuple

from absl import flags

from coalesce.models import by_name
from coalesce.runtime.runtime import Runtime
from coalesce.scheduler import workloads
from coalesce.scheduler.catalog import Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command, WakeAt
from coalesce.scheduler.events import Completed, Event, Submitted
from coalesce.scheduler.machine import Host, quantiles
from coalesce.scheduler.request import Request
from coalesce.scheduler.run import Decision, Outcome, Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival
from experiments import own_flags
from experiments.live import Kind, Live, move_in, Seen, serve, tenants
from experiments.results import device_name, header, Row, save_rows, table

SECOND = 1_000_000_000
LEAST_ALONE_S = 0.0  # rates and SLOs are made for a request that takes as long, if it is faster
POINTS = 2.0  # of attainment, that the two may differ by
WIDTHS = (1, 2, 4, 8, 16)
ALONE = 200  # requests
SETTLE_S = 0.2  # until the driver knows of the last bundle, whose results are out already

FLAGS = flags.FlagValues()
own_flags.define_common(FLAGS)
flags.DEFINE_integer("count", 20, "how many configurations", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_list("configurations", None, "only these, by number", flag_values=FLAGS)
flags.DEFINE_float("duration", 10.0, "seconds of each run", lower_bound=0.1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of the configurations", flag_values=FLAGS)


class Configuration(NamedTuple):
    number: int
    model: str
    fields: dict[str, Any]
    tenants: int
    load: float  # 1 is what the device can do one request at a time
    cv: float
    slo: float  # in times that a request takes alone
    zipf: float
    segments: int


MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mlp", {"width": 384, "layers": 24}),
    ("mlp", {"width": 512, "layers": 24}),
    ("gru", {"steps": 25, "hidden": 512, "features": 512, "classes": 10}),
)


def draw_configurations(count: int, seed: int) -> list[Configuration]:
    """Every number of tenants meets every kind of load; the rest is drawn."""
    rng = Random(seed)
    found = []
    for number in range(count):
        model, fields = MODELS[number % len(MODELS)]
        found.append(
            Configuration(
                number,
                model,
                fields,
                tenants=(2, 4, 8, 16)[number % 4],
                load=(0.3, 0.6, 0.9, 1.2, 1.6)[number % 5],
                cv=rng.choice((0.5, 1.0, 2.0, 4.0)),
                slo=rng.choice((5.0, 10.0, 20.0, 40.0)),
                zipf=rng.choice((0.0, 1.0)),
                segments=rng.choice((1, 1, 2, 3)),
            )
        )
    return found


class Measured:
    """What a run took. Times come again in their order, since slow moments of a machine last for more than one run."""

    def __init__(self, seen: Seen) -> None:
        self.host = Host(decide_ns=int(median(seen.decide_ns or [0])), tell_ns=int(median(seen.tell_ns or [0])))
        self._runs_ns = {entries: itertools.cycle(tuple(runs)) for entries, runs in seen.runs_ns.items()}

    def takes(self, executable: Executable, rng: Random) -> int:
        """One that did not run takes what its warm-up said."""
        known = self._runs_ns.get(executable.entries)
        return next(known) if known is not None else quantiles(executable, rng)


class Later:
    """A policy that was told a log, and goes on after it on another clock, which starts at 0."""

    def __init__(self, log: Iterable[Decision], start_ns: int) -> None:
        self._policy, self._start_ns = Coalescing(), start_ns
        for event, now_ns, _ in log:
            if now_ns < start_ns:
                self._policy.on_event(event, now_ns)

    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        commands = self._policy.on_event(self._moved(event), self._start_ns + now_ns)
        return [c._replace(time_ns=c.time_ns - self._start_ns) if isinstance(c, WakeAt) else c for c in commands]

    def _moved(self, event: Event) -> Event:
        by = self._start_ns
        if isinstance(event, Submitted):
            moved = (r._replace(arrival_ns=r.arrival_ns + by, deadline_ns=r.deadline_ns + by) for r in event.requests)
            return Submitted(tuple(moved))
        if isinstance(event, Completed):
            return event._replace(start_ns=event.start_ns + by, end_ns=event.end_ns + by)
        return event


def again(requests: Iterable[Request], start_ns: int) -> list[Arrival]:
    """Requests that the real runtime got, as arrivals after `start_ns`."""
    ordered = sorted(requests, key=lambda request: request.arrival_ns)
    return [Arrival(r.arrival_ns - start_ns, r.tenant, r.deadline_ns - r.arrival_ns, 0, r.family) for r in ordered]


def attainment(run: Run, host: Host) -> float:
    """As the real runtime counts: by when the device was done, not by when the driver knew."""
    known = zip(run.requests, run.outcomes, run.ends_ns, strict=True)
    done = (Outcome.OK, Outcome.LATE)
    in_time = sum(how in done and end - host.tell_ns <= own.deadline_ns for own, how, end in known)
    return in_time / len(run.requests)


def runtime(own: Configuration, seen: Seen) -> Runtime:
    widths = [width for width in WIDTHS if width < 2 * own.tenants]
    return Runtime(widths=widths, segments=own.segments, observers=[seen])


def arrivals(own: Configuration, rate: float, lives: Sequence[Live], seed: int) -> Iterable[Arrival]:
    rng = Random(f"{own.number} {seed}")
    names = [live.name for live in lives]
    times = workloads.gamma(rng, rate, own.cv)
    return workloads.arrive(rng, times, names, round(FLAGS.duration * SECOND), workloads.zipf(len(names), own.zipf))


def simulated(seen: Seen, start_ns: int, times: Measured, seed: int) -> Run:
    """The second run, in the simulator."""
    return simulate(
        Later(seen.log or (), start_ns),
        seen.tenants.values(),
        seen.catalog,
        again(seen.requests, start_ns),
        takes=times.takes,
        host=times.host,
        seed=seed,
    )


@cache
def alone_s(number: int) -> float:
    """What a request of a model takes from submit to result, with nobody else there."""
    seen, (model, fields) = Seen(), MODELS[number]
    lives = tenants([Kind(model, by_name(model, **fields), 1, 60.0)])
    with Runtime(widths=[1], segments=1, observers=[seen]) as rt:
        move_in(rt, lives)
        seen.clear()
        for _ in range(ALONE):
            rt.submit(lives[0].name, *lives[0].inputs).result(60)
    return median(seen.latencies_ns[lives[0].name]) / SECOND


def compare(own: Configuration) -> Row:
    print(f"configuration {own.number}: {own}", file=sys.stderr, flush=True)
    took_s = max(LEAST_ALONE_S, alone_s(own.number % len(MODELS)))
    rate, slo_s = own.load / took_s, own.slo * took_s
    seen = Seen(keep_log=True)
    lives = tenants([Kind(own.model, by_name(own.model, **own.fields), own.tenants, slo_s)])
    with runtime(own, seen) as rt:
        move_in(rt, lives)
        seen.clear()
        serve(rt, lives, arrivals(own, rate, lives, 1))
        learnt = Measured(seen)
        seen.clear()
        time.sleep(SETTLE_S)
        start_ns = time.monotonic_ns()
        serve(rt, lives, arrivals(own, rate, lives, 2))
    run, hindsight = (simulated(seen, start_ns, which, own.number) for which in (learnt, Measured(seen)))
    real, predicted = seen.attainment(), attainment(run, learnt.host)
    return {
        **own._asdict(),
        "alone_ms": round(took_s * 1e3, 4),
        "slo_ms": round(slo_s * 1e3, 3),
        "rate": round(rate, 1),
        "requests": len(seen.requests),
        "real": round(real, 5),
        "simulated": round(predicted, 5),
        "points": round(100 * (predicted - real), 3),
        "hindsight": round(attainment(hindsight, learnt.host), 5),
        "real_lanes": round(seen.lanes / max(1, seen.bundles), 3),
        "simulated_lanes": round(run.lanes / max(1, run.bundles), 3),
        "failed": "",
    }


def report(head: Mapping[str, Any], rows: Sequence[Row]) -> str:
    within = sum(abs(row["points"]) <= POINTS for row in rows)
    lines = [
        [
            str(row["number"]),
            ", ".join([row["model"], *(f"{k}={v}" for k, v in row["fields"].items() if k in ("width", "hidden"))]),
            str(row["tenants"]),
            str(row["segments"]),
            f"{row['load']:g}",
            f"{row['cv']:g}",
            f"{row['slo_ms']:.1f}",
            f"{row['requests']:,}",
            f"{row['real']:.2%}",
            f"{row['simulated']:.2%}",
            f"{row['points']:+.2f}",
            f"{100 * (row['hindsight'] - row['real']):+.2f}",
            f"{row['real_lanes']:.2f}",
            f"{row['simulated_lanes']:.2f}",
        ]
        for row in rows
    ]
    columns = ["", "model", "tenants", "segments", "load", "CV", "SLO ms", "requests", "real", "simulated"]
    text = [
        "# The simulator against the real runtime",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        f"Requests in time: {within} of {len(rows)} configurations within {POINTS:g} points. Load 1 is one request "
        "after the other; `lanes` are requests a bundle, real and simulated. `hindsight` are the points where the "
        "simulator gets the second run's own times: what is left is not the machine's being slower than before.",
        table([*columns, "points", "hindsight", "lanes", "lanes (sim)"], lines),
    ]
    return "\n\n".join(text) + "\n"


def main(argv: Sequence[str]) -> None:
    own_flags.parse("sim_vs_real", FLAGS, argv)
    settings = {"count": FLAGS.count, "duration_s": FLAGS.duration, "seed": FLAGS.seed, "widths": list(WIDTHS)}
    head = header(own_flags.command("sim_vs_real", FLAGS), FLAGS.device_name or device_name(), FLAGS.note, **settings)
    chosen = None if FLAGS.configurations is None else set(map(int, FLAGS.configurations))
    path = own_flags.folder(FLAGS) / "sim_vs_real.json"
    rows: list[Row] = []
    for own in draw_configurations(FLAGS.count, FLAGS.seed):
        if chosen is None or own.number in chosen:
            rows.append(compare(own))
            save_rows(path, head, rows)
    text = report(head, rows)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
