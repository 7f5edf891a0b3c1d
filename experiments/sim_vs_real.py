"""Claim: the simulator says what the real runtime will do: attainment within 2 points, over 20 configurations.

    python -m experiments.sim_vs_real
    python -m experiments.sim_vs_real --configurations=0,7 --duration=3

A configuration is served twice by the real runtime, with other arrivals each time. The first run measures how long each
executable takes, and how long the driver needs to decide and to be told; its figures are all that the simulator gets,
besides the tenants and the arrivals of the second run. Then both have the same requests, at the same times, under the
same policy, and the share of requests in time is compared.

Configurations differ in tenants, rates, unevenness, SLOs and the number of segments, and are drawn from a seed. Rates
are in units of what the device can do one request at a time, SLOs in units of a request's time alone, as the runtime
serves it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from statistics import median
from typing import Any, NamedTuple

from absl import flags

from coalesce.models import by_name
from coalesce.runtime.runtime import Runtime
from coalesce.scheduler import workloads
from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.machine import Host
from coalesce.scheduler.request import Request
from coalesce.scheduler.run import Outcome, Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival
from experiments import own_flags
from experiments.live import Kind, Live, move_in, Seen, serve, tenants
from experiments.results import device_name, header, Row, save_rows, table

SECOND = 1_000_000_000
LEAST_ALONE_S = 0.0  # rates and SLOs are made for a request that takes as long, if it is faster
POINTS = 2.0  # of attainment, that the two may differ by
WIDTHS = (1, 2, 4, 8, 16)

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
    ("gru", {"steps": 16, "hidden": 256, "features": 256, "classes": 10}),
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
                segments=(1, 1, 2, 3)[rng.randrange(4)] if SEGMENTS else 1,
            )
        )
    return found


class Measured(NamedTuple):
    """What the simulator gets from the first run."""

    catalog: Catalog
    runs_ns: Mapping[tuple[Entry, ...], Sequence[int]]
    host: Host

    def takes(self, executable: Executable, rng: Random) -> int:
        known = self.runs_ns.get(executable.entries)
        return rng.choice(known) if known else rng.randint(executable.l50_ns, executable.l99_ns)


def measured(seen: Seen) -> Measured:
    """Executables that the first run did not use keep the quantiles of their warm-up."""
    made = []
    for own in seen.catalog.executables:
        runs = sorted(seen.runs_ns.get(own.entries, ()))
        if runs:
            own = own._replace(l50_ns=int(median(runs)), l99_ns=runs[int(0.99 * (len(runs) - 1))])
        made.append(own)
    host = Host(decide_ns=int(median(seen.decide_ns)), tell_ns=int(median(seen.tell_ns)))
    catalog = Catalog(tuple(made), seen.catalog.segments, seen.catalog.slots)
    return Measured(catalog, {entries: tuple(runs) for entries, runs in seen.runs_ns.items()}, host)


def again(requests: Iterable[Request]) -> list[Arrival]:
    """Requests that the real runtime got, as arrivals."""
    ordered = sorted(requests, key=lambda request: request.arrival_ns)
    first_ns = ordered[0].arrival_ns
    return [Arrival(r.arrival_ns - first_ns, r.tenant, r.deadline_ns - r.arrival_ns, 0, r.family) for r in ordered]


def attainment(run: Run, host: Host) -> float:
    """As the real runtime counts: by when the device was done, not by when the driver knew."""
    known = zip(run.requests, run.outcomes, run.ends_ns, strict=True)
    done = (Outcome.OK, Outcome.LATE)
    in_time = sum(how in done and end - host.tell_ns <= own.deadline_ns for own, how, end in known)
    return in_time / len(run.requests)


SEGMENTS = False  # `Runtime(segments=)`


def runtime(own: Configuration, seen: Seen) -> Runtime:
    widths = [width for width in WIDTHS if width < 2 * own.tenants]
    return Runtime(widths=widths, observers=[seen])


def arrivals(own: Configuration, rate: float, lives: Sequence[Live], seed: int) -> Iterable[Arrival]:
    rng = Random(f"{own.number} {seed}")
    names = [live.name for live in lives]
    times = workloads.gamma(rng, rate, own.cv)
    return workloads.arrive(rng, times, names, round(FLAGS.duration * SECOND), workloads.zipf(len(names), own.zipf))


def alone_s(rt: Runtime, seen: Seen, live: Live) -> float:
    """What a request takes from submit to result, with nobody else there."""
    seen.clear()
    for _ in range(100):
        rt.submit(live.name, *live.inputs).result(60)
    return median(seen.latencies_ns[live.name]) / SECOND


def compare(own: Configuration) -> Row:
    print(f"configuration {own.number}: {own}", file=sys.stderr, flush=True)
    seen = Seen()
    lives = tenants([Kind(own.model, by_name(own.model, **own.fields), own.tenants, 60.0)])
    with runtime(own, seen) as rt:
        move_in(rt, lives)
        took_s = max(LEAST_ALONE_S, alone_s(rt, seen, lives[0]))
        rate = own.load / took_s
        slo_ns = round(own.slo * took_s * SECOND)
        seen.clear()
        serve(rt, lives, with_slo(arrivals(own, rate, lives, 1), slo_ns))
        learnt = measured(seen)
        seen.clear()
        serve(rt, lives, with_slo(arrivals(own, rate, lives, 2), slo_ns))
    known = [tenant._replace(slo_ns=slo_ns) for tenant in seen.tenants.values()]
    run = simulate(
        Coalescing(), known, learnt.catalog, again(seen.requests), takes=learnt.takes, host=learnt.host, seed=own.number
    )
    real, simulated = seen.attainment(), attainment(run, learnt.host)
    return {
        **own._asdict(),
        "alone_ms": round(took_s * 1e3, 4),
        "slo_ms": round(slo_ns / 1e6, 3),
        "rate": round(rate, 1),
        "requests": len(seen.requests),
        "real": round(real, 5),
        "simulated": round(simulated, 5),
        "points": round(100 * (simulated - real), 3),
        "real_lanes": round(seen.lanes / max(1, seen.bundles), 3),
        "simulated_lanes": round(run.lanes / max(1, run.bundles), 3),
        "failed": "",
    }


def with_slo(coming: Iterable[Arrival], slo_ns: int) -> Iterable[Arrival]:
    return (arrival._replace(allowed_ns=slo_ns) for arrival in coming)


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
            f"{row['real_lanes']:.2f}",
            f"{row['simulated_lanes']:.2f}",
        ]
        for row in rows
    ]
    columns = ["", "model", "tenants", "segments", "load", "CV", "SLO ms", "requests", "real", "simulated", "points"]
    text = [
        "# The simulator against the real runtime",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        f"Requests in time: {within} of {len(rows)} configurations within {POINTS:g} points. Load 1 is one request "
        "after the other; `lanes` are requests a bundle, real and simulated.",
        table([*columns, "lanes", "lanes (sim)"], lines),
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
