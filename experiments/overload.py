"""Past capacity, and after a burst: what each policy still serves in time, against the bound. Simulated.

    python -m experiments.overload

Ten tenants of one program, a run of b lanes in 1 ms + 50 us b, an SLO of 25 ms. The first part offers more and more:
goodput is what ends in time, a second. The second runs at 75% of the bound, and for 60 or 100 ms at ten times that:
a policy that recovers has 99% in time again soon, a metastable one stays down though the load is what it was before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

from absl import app, flags

from coalesce.scheduler.run import Outcome, Run
from coalesce.scheduler.workloads import Arrival, arrive, merge, poisson
from experiments import overload_report
from experiments.results import header, Row, writable
from experiments.settings import command, FLAGS
from experiments.simulated import arrivals_of, chosen, DEVICE, fill, numbers_of, POLICIES, run_policy, SECOND, Setting

for shared in ("policies", "horizon_s", "seed", "note", "out", "force"):
    flags.declare_key_flag(shared)  # --help lists them

MS = 1_000_000
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 480)
USUAL = Setting(tenants=10, slo_scale=25 / 1.05, alpha_us=50.0, beta_us=1000.0, widths=WIDTHS, spread=1.0)
FINE = replace(USUAL, widths=(*range(1, 32), *range(32, 128, 4), *range(128, 481, 16)))  # near to any batch
OFFERED_FINE = (16_000, 20_000, 36_000)
OFFERED = (8_000, 12_000, 16_000, 18_000, 20_000, 24_000, 36_000, 100_000)
BURSTS_MS = (60, 100)
LOAD, TIMES = 0.75, 10  # before and after a burst, and in it
BURST_AT_S, BURST_END_S = 0.5, 2.0
BIN_MS = 25
LINE = 0.99


def offer(part: str, name: str, rate: float, horizon_s: float, seed: int, usual: Setting) -> Row:
    setting = replace(FINE if part == "any width" else usual, rate=rate)
    run = run_policy(name, setting, arrivals_of(setting, round(rate * horizon_s), seed), seed)
    return {"part": part, "policy": name, **asdict(setting), "seed": seed, **numbers_of(run)}


def burst_arrivals(setting: Setting, burst_ms: int, seed: int) -> Iterator[Arrival]:
    """All the time at one rate, and what the burst adds to it."""
    names, rng = [tenant.name for tenant in setting.members], Random(seed)
    begin_ns = round(BURST_AT_S * SECOND)
    usual = arrive(rng, poisson(rng, setting.rate), names, round(BURST_END_S * SECOND))
    more = Random(seed + 1)
    added = poisson(more, (TIMES - 1) * setting.rate, begin_ns)
    return merge(usual, arrive(more, added, names, begin_ns + burst_ms * MS))


def burst(name: str, burst_ms: int, seed: int, usual: Setting) -> Row:
    setting = replace(usual, rate=LOAD * usual.bound)
    run = run_policy(name, setting, burst_arrivals(setting, burst_ms, seed), seed)
    bins = by_arrival(run)
    over_ms = round(BURST_AT_S * 1e3) + burst_ms
    return {
        "part": "burst",
        "policy": name,
        **asdict(setting),
        "seed": seed,
        "burst_ms": float(burst_ms),
        "recovered_after_ms": recovered_after(bins, over_ms),
        "attainment_before": run.attainment(None, 0, round(BURST_AT_S * SECOND) - usual.slo_ns),
        "attainment_after": run.attainment(None, over_ms * MS),
        "attainment_last": run.attainment(None, round((BURST_END_S - 0.5) * SECOND)),
        "bin_ms": BIN_MS,
        "attainment_by_bin": [round(served / asked, 4) if asked else None for served, asked in bins],
        **numbers_of(run),
    }


def by_arrival(run: Run) -> list[tuple[int, int]]:
    """(in time, all) of the requests that arrived in each bin of time."""
    served, asked = Counter[int](), Counter[int]()
    for request, outcome in zip(run.requests, run.outcomes, strict=True):
        at = request.arrival_ns // (BIN_MS * MS)
        asked[at] += 1
        served[at] += outcome is Outcome.OK
    return [(served[i], asked[i]) for i in range(round(BURST_END_S * 1e3) // BIN_MS)]


def recovered_after(bins: Sequence[tuple[int, int]], over_ms: int) -> int | None:
    """Milliseconds from the end of a burst to the first bin with 99% in time, and as much from there on; or None."""
    for i in range(-(-over_ms // BIN_MS), len(bins)):
        rest = bins[i:]
        served, asked = sum(s for s, _ in rest), sum(a for _, a in rest)
        if bins[i][0] >= LINE * bins[i][1] and served >= LINE * asked:
            return i * BIN_MS - over_ms
    return None


Cell = tuple[str, str, float]  # part, policy, and the rate that is offered or how long the burst is


def cells(names: Sequence[str]) -> list[Cell]:
    offered = [("offered", name, float(rate)) for rate in OFFERED for name in names]
    fine = [("any width", name, float(rate)) for rate in OFFERED_FINE for name in names]
    return [*offered, *fine, *(("burst", name, float(ms)) for ms in BURSTS_MS for name in names)]


def cell_of(row: Row) -> Cell:
    return row["part"], row["policy"], row["burst_ms" if row["part"] == "burst" else "rate"]


def measure(cell: Cell, horizon_s: float, seed: int, usual: Setting = USUAL) -> Row:
    part, name, value = cell
    if part == "burst":
        return burst(name, round(value), seed, usual)
    return offer(part, name, value, horizon_s, seed, usual)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]}?")
    folder = writable(Path(FLAGS.out or Path("experiments", "results", "overload")))
    head = header(command("overload", "policies"), DEVICE, FLAGS.note, horizon_s=FLAGS.horizon_s, seed=FLAGS.seed)
    rows = fill(
        folder / "overload.json",
        head,
        cells(chosen(FLAGS.policies)),
        cells(list(POLICIES)),
        cell_of,
        lambda cell: measure(cell, FLAGS.horizon_s, FLAGS.seed),
        FLAGS.force,
    )
    text = overload_report.report(head, rows, USUAL)
    (folder / "overload.md").write_text(text, encoding="utf-8")
    print(text)
    print(overload_report.plot(folder / "overload.png", rows, USUAL))


if __name__ == "__main__":
    app.run(main)
