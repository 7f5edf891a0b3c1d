"""The tables and the plot of slo_attainment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.results import Row, table
from experiments.simulated import POLICIES, policies_in, Setting
from experiments.slo_sweeps import LINE, load_of, setting_of, SWEEPS

TITLES = {
    "rate": "requests a second",
    "cv": "CV of arrivals",
    "slo_scale": "SLO, times one run alone",
    "tenants": "tenants",
    "families": "different programs among 16 tenants",
    "spread": "l99 of a run, times its median",
}


def report(head: Mapping[str, Any], rows: Sequence[Row]) -> str:
    usual = Setting()
    text = [
        "# Requests in time, by policy",
        f"Simulated; {head['date']}.",
        f"    {head['command']}",
        f"Unless a table says otherwise: {usual.tenants} tenants of one program, Poisson arrivals, equal shares; a run "
        f"of b lanes takes {usual.beta_us:g} + {usual.alpha_us:g} b us in widths {', '.join(map(str, usual.widths))}, "
        f"l99 {100 * (usual.spread - 1):.0f}% above the median; the SLO is {usual.slo_scale:g} times a run alone, "
        f"{usual.slo_ns / 1e6:.2f} ms. No scheduler serves more than {usual.bound:,.0f} requests a second in time. "
        f"About {head['settings']['requests']:,} requests a cell, and half as many at each rate of a search.",
        "*apart*: lanes of different tenants never share a run, as in the published systems. *One by one*: no two "
        "requests share a run; where all SLOs are equal, EDF is FIFO. All policies dispatch the next bundle 0.2 ms "
        "before the last one ends.",
        f"## The rate at which {100 * LINE:.0f}% of the requests are in time",
        search_table([row for row in rows if row["sweep"] == "search"]),
        "*Bound*: max{b / l(b): l(b) <= SLO}. *Fused* and *unfused load*: the rate at which a device that serves all "
        "tenants in one run, or each in a run of its own in turn, can still be in time whoever comes when; 0 where "
        "turns alone take too long. A rate of 0: not even half a percent of the bound.",
    ]
    for sweep in SWEEPS:
        own = [row for row in rows if row["sweep"] == sweep]
        if own:
            load = "" if sweep == "rate" else f", at {load_of(sweep) * usual.bound:,.0f} requests a second"
            text += [f"## Share in time by {TITLES[sweep]}{load}", attainment_table(sweep, own)]
    over = [row for row in rows if row["sweep"] == "rate"]
    text += [
        "## Goodput, results in time a second",
        attainment_table("rate", over, "goodput"),
        "## p99 of the results, of the SLO",
        attainment_table("rate", over, "latency_p99_us"),
    ] * bool(over)
    return "\n\n".join(text) + "\n"


def search_table(rows: Sequence[Row]) -> str:
    lines = []
    for i in sorted({row["value"] for row in rows}):
        own = {row["policy"]: row for row in rows if row["value"] == i}
        any_of = next(iter(own.values()))
        setting = [str(any_of[key]) for key in ("tenants", "families")]
        setting += [f"{any_of[key]:g}" for key in ("cv", "slo_scale")]
        bounds = [f"{any_of[key]:,.0f}" for key in ("bound", "fused_load", "unfused_load")]
        rates = [f"{own[name]['rate']:,.0f}" if name in own else "" for name in policies_in(rows)]
        lines.append([*setting, *bounds, *rates])
    columns = ["tenants", "programs", "CV", "SLO scale", "bound", "fused load", "unfused load", *policies_in(rows)]
    return table(columns, lines)


def attainment_table(sweep: str, rows: Sequence[Row], what: str = "attainment") -> str:
    found = {(row["value"], row["policy"]): row for row in rows}
    lines = []
    for value in (v for v in SWEEPS[sweep] if any(v == key[0] for key in found)):
        setting = setting_of(sweep, value)
        first = f"{setting.rate:,.0f} ({100 * value:.0f}% of the bound)" if sweep == "rate" else f"{value:g}"
        cells = [shown(found.get((value, name)), what) for name in policies_in(rows)]
        most = min(setting.rate, setting.bound)
        bounds = {"goodput": f"{most:,.0f}", "attainment": f"{100 * most / setting.rate:.1f}%"}
        lines.append([first, *cells, *([bounds[what]] if what in bounds else [])])
    return table([TITLES[sweep], *policies_in(rows), *["bound"] * (what in ("goodput", "attainment"))], lines)


def shown(row: Row | None, what: str) -> str:
    if row is None:
        return ""
    if what == "latency_p99_us":
        return "-" if row[what] is None else f"{100 * row[what] * 1e3 / Setting().slo_ns:.0f}%"
    return f"{row[what]:,.0f}" if what == "goodput" else f"{100 * row[what]:.1f}%"


def plot(path: Path, rows: Sequence[Row]) -> str:
    """Attainment by each parameter with the 99% line, and goodput by rate with the bound; returns what to print."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'coalesce-jax[plot]')"
    figure = Figure(figsize=(18, 8), layout="constrained")
    *grid, last = figure.subplots(2, 4).flat
    last.axis("off")
    usual = Setting()
    for axes, sweep in zip(grid, SWEEPS, strict=False):
        for name in policies_in(rows):
            points = sorted((row["value"], row) for row in rows if (row["sweep"], row["policy"]) == (sweep, name))
            at = [value * usual.bound if sweep == "rate" else value for value, _ in points]
            axes.plot(at, [100 * row["attainment"] for _, row in points], marker=".", label=name, **style(name))
        axes.axhline(100 * LINE, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel=TITLES[sweep], ylabel="% in time", ylim=(0, 102))
        if sweep != "rate":
            axes.set_xscale("log", base=2)
            axes.set_xticks(SWEEPS[sweep], [f"{value:g}" for value in SWEEPS[sweep]])
            axes.minorticks_off()
    axes = grid[-1]
    for name in policies_in(rows):
        own = [row for row in rows if (row["sweep"], row["policy"]) == ("rate", name)]
        points = sorted((row["rate"], row["goodput"]) for row in own)
        axes.plot([x for x, _ in points], [y for _, y in points], marker=".", **style(name))
    axes.axhline(usual.bound, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel=TITLES["rate"], ylabel="results in time a second")
    for axes in grid:
        axes.grid(alpha=0.3)
    last.legend(*grid[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return f"plot: {path}"


def style(name: str) -> dict[str, Any]:
    """One colour a policy in every plot; ours stands out."""
    number = list(POLICIES).index(name)
    return {"color": f"C{number}", "linewidth": 2.5 if number == 0 else 1.2}
