"""Claim: the simulator says what the real runtime will do: attainment within 2 points, over 20 configurations.

    python -m experiments.sim_vs_real
    python -m experiments.sim_vs_real --configurations=0,7 --duration=3 --slices=2

A configuration is served in slices, one to learn and one to compare in turns, with other arrivals in each. From a slice
that is compared, and the two that are learnt from around it, the simulator gets: how long the host and each executable
took in those two (experiments/measured_machine.py), the policy as the log of the real driver leaves it at the
beginning, and the arrivals. Then both have the same requests at the same times, and the share of requests in time is
compared. `--again` serves each compared slice a second time, which says how much two real runs differ.

Configurations differ in tenants, rates, unevenness, SLOs and the number of segments, and are drawn from a seed. Load 1
is what the runtime can do one request at a time; an SLO is so many times what a request takes alone. Those that the
results have are not served again.
"""

from __future__ import annotations

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
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command, WakeAt
from coalesce.scheduler.events import Completed, Event, Submitted
from coalesce.scheduler.request import Request
from coalesce.scheduler.run import Decision, Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival
from experiments import own_flags
from experiments.live import Kind, Live, move_in, Seen, serve, tenants
from experiments.measured_machine import host_of, MeasuredDevice, Ran
from experiments.results import device_name, header, load_rows, Row, save_rows, table

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
flags.DEFINE_float("duration", 10.0, "seconds that are compared, and learnt from", lower_bound=0.1, flag_values=FLAGS)
flags.DEFINE_integer("slices", 5, "into which they are cut", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("again", False, "serve what is compared a second time", flag_values=FLAGS)
flags.DEFINE_float("budget_s", None, "no configuration starts after so many seconds", flag_values=FLAGS)
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


class Slice(NamedTuple):
    """What was served in a while."""

    seed: int
    start_ns: int
    log: Sequence[Decision]
    requests: Sequence[Request]
    in_time: int
    ran: Sequence[Ran]
    lanes: int


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


def runtime(own: Configuration, seen: Seen) -> Runtime:
    widths = [width for width in WIDTHS if width < 2 * own.tenants]
    return Runtime(widths=widths, segments=own.segments, observers=[seen])


def arrivals(own: Configuration, rate: float, lives: Sequence[Live], seed: int) -> Iterable[Arrival]:
    rng = Random(f"{own.number} {seed}")
    names = [live.name for live in lives]
    times, end_ns = workloads.gamma(rng, rate, own.cv), round(FLAGS.duration / FLAGS.slices * SECOND)
    return workloads.arrive(rng, times, names, end_ns, workloads.zipf(len(names), own.zipf))


def served(rt: Runtime, own: Configuration, rate: float, lives: Sequence[Live], seen: Seen, seed: int) -> Slice:
    time.sleep(SETTLE_S)
    seen.clear()
    start_ns, first = time.monotonic_ns(), len(seen.log or ())
    serve(rt, lives, arrivals(own, rate, lives, seed))
    time.sleep(SETTLE_S)
    in_time = sum(outcomes["ok"] for outcomes in seen.outcomes.values())
    return Slice(seed, start_ns, (seen.log or [])[first:], seen.requests, in_time, seen.ran, seen.lanes)


def simulated(seen: Seen, own: Slice, around: Sequence[Slice], seed: int) -> tuple[int, Run]:
    """(how many would have been in time, the run), if everything took what it took in slices around."""
    device = MeasuredDevice(ran for other in around for ran in other.ran)
    run = simulate(
        Later(seen.log or (), own.start_ns),
        seen.tenants.values(),
        seen.catalog,
        again(own.requests, own.start_ns),
        takes=device.takes,
        host=host_of([other.log for other in around]),
        seed=seed,
        watchers=[device.see],
    )
    return device.in_time(run), run


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
    kinds = "learn compare again".split() if FLAGS.again else "learn compare".split()
    slices: dict[str, list[Slice]] = {kind: [] for kind in kinds}
    with runtime(own, seen) as rt:
        move_in(rt, lives)
        for number in range(FLAGS.slices + 1):
            for kind in kinds if number < FLAGS.slices else kinds[:1]:
                slices[kind].append(served(rt, own, rate, lives, seen, 2 * number + (kind != "learn")))
    learnt, compared = slices["learn"], slices["compare"]
    around = [learnt[i : i + 2] for i in range(len(compared))]
    runs = [simulated(seen, one, others, own.number) for one, others in zip(compared, around, strict=True)]
    hindsight = [simulated(seen, one, [one], own.number) for one in compared]
    requests, bundles = sum(len(one.requests) for one in compared), sum(len(one.ran) for one in compared)
    real, predicted, known = (
        sum(in_time) / max(1, requests)
        for in_time in ([c.in_time for c in compared], [n for n, _ in runs], [n for n, _ in hindsight])
    )
    repeated = slices.get("again", [])
    return {
        **own._asdict(),
        "alone_ms": round(took_s * 1e3, 4),
        "slo_ms": round(slo_s * 1e3, 3),
        "rate": round(rate, 1),
        "requests": requests,
        "real": round(real, 5),
        "again": round(sum(one.in_time for one in repeated) / max(1, requests), 5) if repeated else None,
        "simulated": round(predicted, 5),
        "points": round(100 * (predicted - real), 3),
        "hindsight": round(known, 5),
        "real_lanes": round(sum(one.lanes for one in compared) / max(1, bundles), 3),
        "simulated_lanes": round(sum(r.lanes for _, r in runs) / max(1, sum(r.bundles for _, r in runs)), 3),
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
            "" if row["again"] is None else f"{100 * (row['again'] - row['real']):+.2f}",
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
        "simulator gets the compared slices' own times: what is left is not the machine's being slower than before. "
        "`again` is what the real runtime differs from itself by, with the same arrivals once more.",
        table([*columns, "points", "hindsight", "again", "lanes", "lanes (sim)"], lines),
    ]
    return "\n\n".join(text) + "\n"


def main(argv: Sequence[str]) -> None:
    begun_s = time.monotonic()
    own_flags.parse("sim_vs_real", FLAGS, argv)
    settings = {"count": FLAGS.count, "duration_s": FLAGS.duration, "slices": FLAGS.slices, "again": FLAGS.again}
    settings |= {"seed": FLAGS.seed, "widths": list(WIDTHS)}
    head = header(own_flags.command("sim_vs_real", FLAGS), FLAGS.device_name or device_name(), FLAGS.note, **settings)
    chosen = None if FLAGS.configurations is None else set(map(int, FLAGS.configurations))
    path = own_flags.folder(FLAGS) / "sim_vs_real.json"
    rows = load_rows(path, head)
    for own in draw_configurations(FLAGS.count, FLAGS.seed):
        if own.number in {row["number"] for row in rows} or (chosen is not None and own.number not in chosen):
            continue
        if FLAGS.budget_s is not None and time.monotonic() - begun_s > FLAGS.budget_s:
            print("the budget is spent; the same command goes on from here", file=sys.stderr)
            break
        rows = sorted([*rows, compare(own)], key=lambda row: row["number"])
        save_rows(path, head, rows)
    text = report(head, rows)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
