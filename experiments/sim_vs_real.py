"""Claim: the simulator says what the real runtime will do: attainment within 2 points, over 20 configurations.

    python -m experiments.sim_vs_real
    python -m experiments.sim_vs_real --configurations=0,7 --duration=3 --slices=6 --out=quick
    python -m experiments.sim_vs_real --duration=2 --slices=4 --most_segments=2 --budget_s=230    # on a GPU

A configuration is served in slices:  teaches  compared  teaches  compared again  teaches  compared, and so on

They are short, since a machine's speed changes within seconds, and by more than what is to be seen here. Arrivals of
one that is compared are served twice, and both count: by how much the two differ is by how much the real runtime
differs from itself. The slices that teach have other arrivals. Of a compared one the simulator gets its arrivals, and
the policy as the log of the real driver leaves it when it begins. How long the host and each executable take comes from
the two slices that teach around it alone (experiments/measured_machine.py), or from all that teach where an executable
ran in neither; what a request takes from the run during which it comes, from all that teach
(experiments/sim_vs_real_stolen.py). It is simulated twice, with the two in either order. Then both have had the same
requests at the same times, and the share of requests in time is compared.

Configurations differ in tenants, rates, unevenness, SLOs and the number of segments, and are drawn from a seed. Load 1
is what the runtime can do one request at a time; an SLO is so many times what a request takes alone. Those that the
results have are not served again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from math import sqrt
from typing import NamedTuple

import jax
from absl import flags

from coalesce.scheduler.native import is_native
from coalesce.scheduler.request import Request
from coalesce.scheduler.run import Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival
from experiments import own_flags
from experiments.configurations import Configuration, draw_configurations, MODELS, place_of
from experiments.live import Seen
from experiments.measured_machine import host_of, MeasuredDevice
from experiments.results import device_name, header, load_rows, OUT, Row, save_rows
from experiments.sim_vs_real_follow import Following, Later
from experiments.sim_vs_real_report import report
from experiments.sim_vs_real_slices import alone_s, Asked, Hall, Slice, WIDTHS
from experiments.sim_vs_real_stolen import disturbed_ns, Served, stolen_ns

LEAST_ALONE_S = 0.0  # rates and SLOs are made for a request that takes as long, if it is faster

FLAGS = flags.FlagValues()
own_flags.define_common(FLAGS)
flags.DEFINE_integer("count", 20, "how many configurations", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_list("configurations", None, "only these, by number", flag_values=FLAGS)
flags.DEFINE_float("duration", 10.0, "seconds of arrivals that are compared", lower_bound=0.1, flag_values=FLAGS)
flags.DEFINE_integer("slices", 20, "into which they are cut", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("most_segments", 3, "more than that are drawn as that", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("budget_s", None, "no configuration starts after so many seconds", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of the configurations", flag_values=FLAGS)


def again(requests: Iterable[Request], start_ns: int) -> list[Arrival]:
    """Requests that the real runtime got, as arrivals after `start_ns`."""
    ordered = sorted(requests, key=lambda request: request.arrival_ns)
    return [Arrival(r.arrival_ns - start_ns, r.tenant, r.deadline_ns - r.arrival_ns, 0, r.family) for r in ordered]


class Taught(NamedTuple):
    """What was learnt from slices."""

    slices: list[Slice]  # with runs as if no request had come meanwhile
    each_ns: int  # what a request takes from a run during which it comes


def learn(slices: Sequence[Slice]) -> Taught:
    each_ns = stolen_ns(map(served_in, slices))
    return Taught([by_itself(one, each_ns) for one in slices], each_ns)


def served_in(one: Slice) -> Served:
    return Served(one.ran, [arrival.time_ns for arrival in again(one.requests, one.start_ns)])


def by_itself(one: Slice, each_ns: int) -> Slice:
    return one._replace(ran=served_in(one).undisturbed(each_ns))


def simulated(
    seen: Seen, policy: Later, own: Slice, around: Sequence[Slice], taught: Taught, seed: int
) -> tuple[int, Run]:
    """(how many would have been in time, the run), if everything took what it took in slices around."""
    arrivals = again(own.requests, own.start_ns)
    disturbed = partial(disturbed_ns, [arrival.time_ns for arrival in arrivals], taught.each_ns)
    device = MeasuredDevice([other.ran for other in around], [other.ran for other in taught.slices], disturbed)
    run = simulate(
        policy,
        seen.tenants.values(),
        seen.catalog,
        arrivals,
        takes=device.takes,
        host=host_of([other.log for other in around], lambda: device.now_ns),
        seed=seed,
        watchers=[device.see],
    )
    return device.in_time(run), run


def compare(own: Configuration, hall: Hall) -> Row:
    print(f"configuration {own.number}: {own}", file=sys.stderr, flush=True)
    took_s = max(LEAST_ALONE_S, alone_s(own.model, tuple(own.fields.items())))
    rate, slo_s = own.load / took_s, own.slo * took_s
    seen, lives = hall.seen, hall.enter(own, slo_s)
    served = list(hall.serve_in_turns(Asked(own, rate, FLAGS.duration / FLAGS.slices), lives, FLAGS.slices))
    taught = learn([one for is_compared, one in served if not is_compared])
    compared = [one for is_compared, one in served if is_compared]
    following, runs, hindsight = Following(seen.log or ()), [], []
    for i, one in enumerate(compared):
        before, after = taught.slices[i : i + 2]
        for around in (before, after), (after, before):
            runs.append(simulated(seen, following.later(one.start_ns), one, around, taught, own.number))
        itself = [by_itself(one, taught.each_ns)]
        hindsight.append(simulated(seen, following.later(one.start_ns), one, itself, taught, own.number))
    hall.leave(lives)
    requests, bundles = sum(len(one.requests) for one in compared), sum(len(one.ran) for one in compared)
    real, predicted, known = (
        sum(in_time) / max(1, requests)
        for in_time in ([c.in_time for c in compared], [n / 2 for n, _ in runs], [n for n, _ in hindsight])
    )
    apart = [second.in_time - first.in_time for first, second in zip(compared[::2], compared[1::2], strict=True)]
    return {
        **own._asdict(),
        "alone_ms": round(took_s * 1e3, 4),
        "slo_ms": round(slo_s * 1e3, 3),
        "rate": round(rate, 1),
        "requests": requests,
        "stolen_us": round(taught.each_ns / 1e3, 1),
        "real": round(real, 5),
        "again": round(200 * sum(apart) / max(1, requests), 3),
        "chance": round(100 * sqrt(sum(own * own for own in apart)) / max(1, requests), 3),
        "simulated": round(predicted, 5),
        "points": round(100 * (predicted - real), 3),
        "hindsight": round(known, 5),
        "real_lanes": round(sum(one.lanes for one in compared) / max(1, bundles), 3),
        "simulated_lanes": round(sum(r.lanes for _, r in runs) / max(1, sum(r.bundles for _, r in runs)), 3),
        "failed": "",
    }


def is_spent(begun_s: float) -> bool:
    return FLAGS.budget_s is not None and time.monotonic() - begun_s > FLAGS.budget_s


def chosen_of(drawn: Sequence[Configuration], numbers: Sequence[str] | None) -> list[Configuration]:
    """Those of these numbers; raises SystemExit for what is none."""
    if numbers is None:
        return list(drawn)
    known = {str(own.number): own for own in drawn}
    if wrong := [number for number in numbers if number.strip() not in known]:
        raise SystemExit(f"what is configuration {wrong[0]}? They are numbered from 0 to {len(drawn) - 1}")
    return [known[number.strip()] for number in dict.fromkeys(numbers)]


def main(argv: Sequence[str]) -> None:
    begun_s = time.monotonic()
    own_flags.parse("sim_vs_real", FLAGS, argv)
    if is_native():
        raise SystemExit("the simulator goes on from copies of the policy, and a compiled one has none: `make clean`")
    models = MODELS["cpu" if jax.default_backend() == "cpu" else "gpu"]
    drawn = draw_configurations(models, FLAGS.count, FLAGS.seed, FLAGS.most_segments)
    chosen = chosen_of(drawn, FLAGS.configurations)
    settings = {"count": FLAGS.count, "duration_s": FLAGS.duration, "slices": FLAGS.slices, "servings": 2}
    settings |= {"seed": FLAGS.seed, "widths": list(WIDTHS), "most_segments": FLAGS.most_segments}
    head = header(own_flags.command("sim_vs_real", FLAGS), FLAGS.device_name or device_name(), FLAGS.note, **settings)
    path = own_flags.folder(FLAGS) / "sim_vs_real.json"
    rows = load_rows(path, head, instead=OUT)
    missing = [own for own in chosen if own.number not in {row["number"] for row in rows}]
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
