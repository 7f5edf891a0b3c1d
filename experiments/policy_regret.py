"""How near each policy comes to the best that could be done: small random instances, against the exact optimum.

    python -m experiments.policy_regret --instances=200

An instance has 2 to 6 tenants of 1 to 3 programs and 10 to 30 requests (experiments/policy_instances.py). Its optimum
is the most requests that can end in time for somebody who knows all that will come, found and proven by integer
programming (experiments/policy_exact.py; needs ortools). Regret is the share of the optimum that a policy loses. No
policy knows what will come; `best of all` is, for each instance, the policy that happened to do best.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

from absl import app, flags

from coalesce.scheduler.run import Outcome
from coalesce.scheduler.simulator import simulate
from experiments.policy_exact import Optimum, solve
from experiments.policy_instances import Instance, random_instance, US
from experiments.results import header, load_rows, Row, save_rows, table, writable
from experiments.settings import command, FLAGS
from experiments.simulated import DEVICE, POLICIES
from experiments.slo_report import style

WORST = 5
BEST = "best of all"


def serve(name: str, instance: Instance) -> int:
    """Requests in time, of a device that takes a bundle at once: nothing is decided ahead of need."""
    run = simulate(POLICIES[name](lead_ns=0), instance.tenants, instance.catalog, instance.arrivals, seed=instance.seed)
    return run.counts()[Outcome.OK]


def measure(seed: int, seconds: float, known: Row | None = None) -> Row:
    """A row of an instance; its optimum, which takes long and never changes, from an earlier one if it was proven."""
    instance = random_instance(seed)
    served = {name: serve(name, instance) for name in POLICIES}
    if known is not None and known["proven"]:
        best = Optimum(known["optimum"], known["optimum"], True)
    else:
        best = solve(instance, max(served.values()), seconds)
    return {
        "seed": seed,
        "requests": len(instance.arrivals),
        "tenants": len(instance.tenants),
        "programs": len(instance.lines),
        "load": instance.load,
        "cv": instance.cv,
        "optimum": best.in_time if best.proven else best.bound,
        "proven": best.proven,
        **served,
    }


def regret(row: Row, name: str) -> float:
    served = max(row[policy] for policy in POLICIES) if name == BEST else row[name]
    return 1 - served / row["optimum"] if row["optimum"] else 0.0


def report(head: Mapping[str, Any], rows: Sequence[Row]) -> str:
    unproven = sum(not row["proven"] for row in rows)
    text = [
        "# What policies lose against the best that could be done",
        f"Simulated; {head['date']}.",
        f"    {head['command']}",
        f"{len(rows)} random instances; the share of the optimum's requests in time that each policy loses. The "
        "optimum knows all that will come. "
        + (f"In {unproven} it was not proven, and an upper bound counts." if unproven else ""),
        regret_table(rows),
        "## Mean regret, by load and by number of programs",
        by_kind(rows),
        f"## The {WORST} instances on which coalescing loses most",
        *(told(row) for row in sorted(rows, key=lambda row: -regret(row, "coalescing"))[:WORST]),
    ]
    return "\n\n".join(text) + "\n"


def regret_table(rows: Sequence[Row]) -> str:
    lines = []
    for name in (*POLICIES, BEST):
        lost = [regret(row, name) for row in rows]
        most = quantiles(lost, n=10, method="inclusive")[-1] if len(lost) > 1 else lost[0]
        best = sum(share <= 0 for share in lost) / len(lost)
        lines.append([name, *(f"{100 * share:.1f}%" for share in (mean(lost), most, max(lost), best))])
    return table(["policy", "mean", "90th percentile", "most", "optimal in"], lines)


def by_kind(rows: Sequence[Row]) -> str:
    kinds = [("load", load) for load in sorted({row["load"] for row in rows})]
    kinds += [("programs", count) for count in sorted({row["programs"] for row in rows})]
    lines = []
    for name in (*POLICIES, BEST):
        own = [[regret(row, name) for row in rows if row[key] == value] for key, value in kinds]
        lines.append([name, *(f"{100 * mean(lost):.1f}%" for lost in own)])
    return table(["policy", *(f"{key} {value:g}" for key, value in kinds)], lines)


def plot(path: Path, rows: Sequence[Row]) -> str:
    """In how many instances a policy loses at most so much, and its mean regret by load; returns what to print."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'coalesce-jax[plot]')"
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    spread, loads = figure.subplots(1, 2)
    for name in (*POLICIES, BEST):
        look = {"color": "black", "linestyle": ":"} if name == BEST else style(name)
        lost = sorted(100 * regret(row, name) for row in rows)
        spread.plot([0, *lost], [100 * i / len(lost) for i in range(len(lost) + 1)], drawstyle="steps-post", **look)
        means = {}
        for load in sorted({row["load"] for row in rows}):
            means[load] = mean(100 * regret(row, name) for row in rows if row["load"] == load)
        loads.plot(list(means), list(means.values()), marker=".", label=name, **look)
    spread.set(xlabel="% of the optimum lost, at most", ylabel="% of the instances", xlim=(0, 60), ylim=(0, 102))
    loads.set(xlabel="load", ylabel="mean % of the optimum lost", ylim=(0, None))
    for axes in (spread, loads):
        axes.grid(alpha=0.3)
    figure.legend(*loads.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return f"plot: {path}"


def told(row: Row) -> str:
    """An instance in words, to be done by hand."""
    instance = random_instance(row["seed"])
    served = ", ".join(f"{name} {row[name]}" for name in POLICIES)
    programs = [f"{line.beta_ns / US:g} + {line.alpha_ns / US:g} b us" for line in instance.lines]
    tenants = [f"{t.name} (program {t.families[0]}, SLO {t.slo_ns / US:g} us)" for t in instance.tenants]
    names = [a.tenant for a in instance.arrivals]
    times = [f"{a.time_ns // US}" for a in instance.arrivals]
    arrivals = " ".join(
        f"{name}@{','.join(time for _, time in own)}"
        for name, own in itertools.groupby(zip(names, times, strict=True), key=lambda pair: pair[0])
    )
    return (
        f"Seed {row['seed']}: of {row['requests']} requests {row['optimum']} can be in time; {served}. Load "
        f"{row['load']:g}, CV {row['cv']:g}; a run of b lanes takes {'; '.join(programs)}; {', '.join(tenants)}. "
        f"Arrivals in us: {arrivals}."
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]}?")
    folder = writable(Path(FLAGS.out or Path("experiments", "results", "policy_regret")))
    head = header(command("policy_regret", "policies"), DEVICE, FLAGS.note, seed=FLAGS.seed)
    path = folder / "policy_regret.json"
    known = {} if FLAGS.force else {row["seed"]: row for row in load_rows(path, head)}
    seeds = range(FLAGS.seed, FLAGS.seed + FLAGS.instances)
    rows = []
    for seed in seeds:
        rows.append(measure(seed, FLAGS.solve_s, known.get(seed)))
        print(f"\r{len(rows)} of {len(seeds)}", end="", file=sys.stderr, flush=True)
        later = (known[other] for other in seeds[len(rows) :] if other in known)
        save_rows(path, head, [*rows, *later])  # optima that are known stay so if this is stopped
    print(file=sys.stderr)
    text = report(head, rows)
    (folder / "policy_regret.md").write_text(text, encoding="utf-8")
    print(text)
    print(plot(folder / "policy_regret.png", rows))


if __name__ == "__main__":
    flags.DEFINE_integer("instances", 200, "instances, of one seed after the other", lower_bound=1)
    flags.DEFINE_float("solve_s", 60.0, "most time for one optimum")
    for shared in ("seed", "note", "out", "force"):
        flags.declare_key_flag(shared)  # --help lists them
    app.run(main)
