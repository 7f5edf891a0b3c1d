"""Claim: the simulator says what the real runtime will do: attainment within 2 points, over 20 configurations.

    python -m experiments.sim_vs_real
    python -m experiments.sim_vs_real --configurations=0,7 --duration=3 --slices=2
    python -m experiments.sim_vs_real --duration=2 --slices=2 --most_segments=2 --budget_s=230    # on a GPU

A configuration is served in slices, one to learn and one to compare in turns, with other arrivals in each. From a slice
that is compared, and the two that are learnt from around it, the simulator gets: how long the host and each executable
took in those two (experiments/measured_machine.py), the policy as the log of the real driver leaves it at the
beginning, and the arrivals. Then both have the same requests at the same times, and the share of requests in time is
compared. `--again` serves each compared slice a second time, which says how much two real runs differ.

Configurations differ in tenants, rates, unevenness, SLOs and the number of segments, and are drawn from a seed. Load 1
is what the runtime can do one request at a time; an SLO is so many times what a request takes alone. Those of one model
in as many segments share a runtime, so that nothing is compiled twice: each has tenants of its own there and a policy
without a memory. Those that the results have are not served again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby
from random import Random
from statistics import median
from typing import Any, NamedTuple

import jax
from absl import flags

from coalesce.models import by_name
from coalesce.runtime.runtime import Runtime
from coalesce.scheduler import workloads
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command, Dispatch, WakeAt
from coalesce.scheduler.events import CatalogChanged, Completed, Event, Submitted, TenantAdded
from coalesce.scheduler.request import Request
from coalesce.scheduler.run import Decision, Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival
from experiments import own_flags
from experiments.configurations import Configuration, draw_configurations, MODELS, place_of
from experiments.live import Kind, Live, move_in, Seen, serve, tenants
from experiments.measured_machine import host_of, MeasuredDevice, Ran
from experiments.results import device_name, header, load_rows, Row, save_rows
from experiments.sim_vs_real_report import report
from experiments.switching import Switching

SECOND = 1_000_000_000
LEAST_ALONE_S = 0.0  # rates and SLOs are made for a request that takes as long, if it is faster
WIDTHS = (1, 2, 4, 8, 16)
MOST = 16  # tenants of a configuration
STAYS_S = 60.0  # the SLO of a tenant that asks for nothing, so that its family stays while others come and go
ALONE = 200  # requests
SETTLE_S = 0.2  # until the driver knows of the last bundle, whose results are out already

FLAGS = flags.FlagValues()
own_flags.define_common(FLAGS)
flags.DEFINE_integer("count", 20, "how many configurations", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_list("configurations", None, "only these, by number", flag_values=FLAGS)
flags.DEFINE_float("duration", 10.0, "seconds that are compared, and learnt from", lower_bound=0.1, flag_values=FLAGS)
flags.DEFINE_integer("slices", 5, "into which they are cut", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("again", False, "serve what is compared a second time", flag_values=FLAGS)
flags.DEFINE_integer("most_segments", 3, "more than that are drawn as that", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("budget_s", None, "no configuration starts after so many seconds", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of the configurations", flag_values=FLAGS)


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
    """A policy that was told a log, and goes on after it on another clock, which starts at 0; whose bundles are
    counted on from others' in the log, and by itself from 0."""

    def __init__(self, log: Sequence[Decision], start_ns: int) -> None:
        self._policy, self._start_ns = Coalescing(), start_ns
        before = next((c.bundle for _, _, commands in log for c in commands if isinstance(c, Dispatch)), 0)
        for event, now_ns, _ in log:
            if now_ns < start_ns:
                own = event._replace(bundle=event.bundle - before) if isinstance(event, Completed) else event
                self._policy.on_event(own, now_ns)

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
    ran = [own._replace(at_ns=own.at_ns - start_ns) for own in seen.ran]
    return Slice(seed, start_ns, (seen.log or [])[first:], seen.requests, in_time, ran, seen.lanes)


def simulated(seen: Seen, own: Slice, around: Sequence[Slice], seed: int) -> tuple[int, Run]:
    """(how many would have been in time, the run), if everything took what it took in slices around."""
    device = MeasuredDevice(other.ran for other in around)
    run = simulate(
        Later(seen.log or (), own.start_ns),
        seen.tenants.values(),
        seen.catalog,
        again(own.requests, own.start_ns),
        takes=device.takes,
        host=host_of([other.log for other in around], lambda: device.now_ns),
        seed=seed,
        watchers=[device.see],
    )
    return device.in_time(run), run


class Hall:
    """A runtime in which configurations of one model, in as many segments, are served one after another."""

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


def compare(own: Configuration, hall: Hall) -> Row:
    print(f"configuration {own.number}: {own}", file=sys.stderr, flush=True)
    took_s = max(LEAST_ALONE_S, alone_s(own.model, tuple(own.fields.items())))
    rate, slo_s = own.load / took_s, own.slo * took_s
    kinds = "learn compare again".split() if FLAGS.again else "learn compare".split()
    slices: dict[str, list[Slice]] = {kind: [] for kind in kinds}
    seen, lives = hall.seen, hall.enter(own, slo_s)
    for number in range(FLAGS.slices + 1):
        for kind in kinds if number < FLAGS.slices else kinds[:1]:
            slices[kind].append(served(hall.rt, own, rate, lives, seen, 2 * number + (kind != "learn")))
    learnt, compared = slices["learn"], slices["compare"]
    around = [learnt[i : i + 2] for i in range(len(compared))]
    runs = [simulated(seen, one, others, own.number) for one, others in zip(compared, around, strict=True)]
    hindsight = [simulated(seen, one, [one], own.number) for one in compared]
    hall.leave(lives)
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


def is_spent(begun_s: float) -> bool:
    return FLAGS.budget_s is not None and time.monotonic() - begun_s > FLAGS.budget_s


def main(argv: Sequence[str]) -> None:
    begun_s = time.monotonic()
    own_flags.parse("sim_vs_real", FLAGS, argv)
    settings = {"count": FLAGS.count, "duration_s": FLAGS.duration, "slices": FLAGS.slices, "again": FLAGS.again}
    settings |= {"seed": FLAGS.seed, "widths": list(WIDTHS), "most_segments": FLAGS.most_segments}
    head = header(own_flags.command("sim_vs_real", FLAGS), FLAGS.device_name or device_name(), FLAGS.note, **settings)
    chosen = None if FLAGS.configurations is None else set(map(int, FLAGS.configurations))
    path = own_flags.folder(FLAGS) / "sim_vs_real.json"
    rows = load_rows(path, head)
    models = MODELS["cpu" if jax.default_backend() == "cpu" else "gpu"]
    missing = [
        own
        for own in draw_configurations(models, FLAGS.count, FLAGS.seed, FLAGS.most_segments)
        if own.number not in {row["number"] for row in rows} and (chosen is None or own.number in chosen)
    ]
    for _, alike in groupby(sorted(missing, key=place_of), key=lambda own: place_of(own)[:2]):
        if is_spent(begun_s):
            break
        first, *others = alike
        print(f"after {time.monotonic() - begun_s:.0f} s: {first.model}, {first.segments} segments", file=sys.stderr)
        alone_s(first.model, tuple(first.fields.items()))
        hall = Hall(first)
        with hall.rt:
            for own in (first, *others):
                if not is_spent(begun_s):
                    rows = sorted([*rows, compare(own, hall)], key=lambda row: row["number"])
                    save_rows(path, head, rows)
                    path.with_suffix(".md").write_text(report(head, rows), encoding="utf-8")
    if is_spent(begun_s):
        print("the budget is spent; the same command goes on from here", file=sys.stderr)
    print(report(head, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
