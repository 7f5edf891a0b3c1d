"""Claim: bursts cost little that could have been had: policies beside the most that can be in time, knowing what comes.

    python -m experiments.hindsight

Sixteen tenants of one program with Gamma arrivals of their own. Runs take what 16 ResNet-50 in bfloat16 took on an H100
with all that the host does for a run, before that was made cheaper. Simulated, with a host that takes no time.

With one program and one SLO whoever comes first is due first, so that it is enough to look at runs of requests that
came one after another: for every request and every number served before it, when the device can be free the soonest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from absl import app, flags

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.run import Outcome
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival, arrive_apart
from experiments.list_flags import define_numbers
from experiments.results import header, Row, save_rows, table, writable
from experiments.settings import command, FLAGS
from experiments.simulated import DEVICE, POLICIES

US = 1_000
TIMES: Mapping[int, int] = {1: 850 * US, 2: 1070 * US, 4: 1620 * US, 8: 1840 * US, 16: 2720 * US}
SHOWN = ("coalescing", "symphony", "clockwork", "EDF packing")
NAMES = [f"t{i}" for i in range(16)]


def most_in_time(arrivals_ns: Sequence[int], slo_ns: int, times: Mapping[int, int]) -> int:
    """How many requests can end within the SLO on one device, in runs of one program; widths and what they take."""
    count, widest = len(arrivals_ns), max(times)
    takes = [0, *(min(ns for width, ns in times.items() if width >= lanes) for lanes in range(1, widest + 1))]
    soonest: list[dict[int, int]] = [{} for _ in range(count + 1)]  # of request i: served before it -> device free at
    soonest[0][0] = 0
    for i, came_ns in enumerate(arrivals_ns):
        for served, free_ns in worth_going_on(soonest[i], came_ns):
            keep(soonest[i + 1], served, free_ns)
            for lanes in range(1, min(widest, count - i) + 1):
                last_ns = arrivals_ns[i + lanes - 1]
                if last_ns + takes[1] > came_ns + slo_ns:
                    break
                end_ns = max(free_ns, last_ns) + takes[lanes]
                if end_ns <= came_ns + slo_ns:
                    keep(soonest[i + lanes], served + lanes, end_ns)
        soonest[i] = {}
    return max(soonest[count])


def worth_going_on(found: Mapping[int, int], came_ns: int) -> list[tuple[int, int]]:
    """Those than which no other has served more and is free sooner; before the next request came is soon enough."""
    best_ns, kept = 1 << 62, []
    for served in sorted(found, reverse=True):
        free_ns = max(found[served], came_ns)
        if free_ns < best_ns:
            best_ns = free_ns
            kept.append((served, free_ns))
    return kept


def keep(found: dict[int, int], served: int, free_ns: int) -> None:
    found[served] = min(free_ns, found.get(served, free_ns))


def measure(slo_ms: float, rate: float, cv: float, requests: int) -> Row:
    slo_ns, end_ns = round(slo_ms * 1e6), round(requests * 1e9 / rate)
    arrivals = list(arrive_apart(Random(1), cv, dict.fromkeys(NAMES, rate / len(NAMES)), end_ns))
    row: Row = {"slo_ms": slo_ms, "rate": rate, "cv": cv, "requests": len(arrivals)}
    row["hindsight"] = most_in_time([a.time_ns for a in arrivals], slo_ns, TIMES) / len(arrivals)
    return row | {name: served(name, arrivals, slo_ns) for name in SHOWN}


def served(name: str, arrivals: Sequence[Arrival], slo_ns: int) -> float:
    made = (Executable(i, (Entry(0, 0, w),), ns, ns * 11 // 10) for i, (w, ns) in enumerate(TIMES.items()))
    run = simulate(POLICIES[name](), [Tenant(t, (0,), slo_ns) for t in NAMES], Catalog(tuple(made)), arrivals)
    return run.counts()[Outcome.OK] / len(arrivals)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]}?")
    folder = writable(Path(FLAGS.out or Path("experiments", "results", "hindsight")))
    cells = [(slo, rate) for slo in FLAGS.slos_ms for rate in FLAGS.rates]
    rows = [measure(*cell, FLAGS.cv, FLAGS.requests) for cell in cells]
    head = header(command("hindsight"), DEVICE, FLAGS.note)
    save_rows(folder / "hindsight.json", head, rows)
    columns = ("hindsight", *SHOWN)
    lines = [[f"{r['slo_ms']:g}", f"{r['rate']:,.0f}", *(f"{100 * r[c]:.2f}%" for c in columns)] for r in rows]
    text = (
        f"# Bursts: requests in time beside the most that could be\n\nSimulated; {head['date']}.\n\n"
        f"    {head['command']}\n\n16 tenants of one program, Gamma arrivals of CV {FLAGS.cv:g} each. A run of "
        f"{', '.join(map(str, TIMES))} lanes takes {', '.join(f'{ns / 1e6:g}' for ns in TIMES.values())} ms. "
        "*Hindsight*: the most that any scheduler could do that knew what would come.\n\n"
        f"{table(['SLO, ms', 'requests a second', *columns], lines)}\n"
    )
    (folder / "hindsight.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    define_numbers("slos_ms", [11.4, 6.4], "SLOs")
    define_numbers("rates", [500, 1000, 2000, 3000, 4000], "requests a second")
    flags.DEFINE_float("cv", 4.0, "of the gaps between a tenant's requests", lower_bound=0)
    for shared in ("requests", "note", "out"):
        flags.declare_key_flag(shared)  # --help lists them
    app.run(main)
