"""The tables and the plot of overload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.results import Row, table
from experiments.simulated import policies_in, Setting
from experiments.slo_probe import admitted_in_time
from experiments.slo_report import style


def report(head: Mapping[str, Any], rows: Sequence[Row], usual: Setting) -> str:
    offered = [row for row in rows if row["part"] == "offered"]
    text = [
        "# Past capacity, and after a burst",
        f"Simulated; {head['date']}.",
        f"    {head['command']}",
        f"{usual.tenants} tenants of one program, Poisson arrivals; a run of b lanes takes {usual.beta_us:g} + "
        f"{usual.alpha_us:g} b us in widths {', '.join(map(str, usual.widths))}; the SLO is {usual.slo_ns / 1e6:g} ms. "
        f"No scheduler serves more than {usual.bound:,.0f} requests a second in time.",
        "## Goodput, results in time a second, by what is offered",
        goodput_table(offered, usual),
    ]
    if fine := [row for row in rows if row["part"] == "any width"]:
        text += [
            "The same where runs of nearly any width are ready, as batches have it elsewhere:",
            goodput_table(fine, usual),
        ]
    text += [
        "## What became of what was admitted: p99 of the results, of the SLO, and the share in time",
        kept_table(offered, usual),
    ]
    for burst_ms in sorted({row["burst_ms"] for row in rows if row["part"] == "burst"}):
        own = [row for row in rows if row["part"] == "burst" and row["burst_ms"] == burst_ms]
        load = f"{100 * own[0]['rate'] / usual.bound:.0f}% of the bound"
        text += [f"## Ten times as many requests for {burst_ms:g} ms, at {load}", burst_table(own, usual)]
    return "\n\n".join(text) + "\n"


def goodput_table(rows: Sequence[Row], usual: Setting) -> str:
    lines = []
    for rate in sorted({row["rate"] for row in rows}):
        own = {row["policy"]: row for row in rows if row["rate"] == rate}
        cells = [f"{own[name]['goodput']:,.0f}" if name in own else "" for name in policies_in(rows)]
        lines.append([f"{rate:,.0f}", *cells, f"{min(rate, usual.bound):,.0f}"])
    return table(["offered", *policies_in(rows), "bound"], lines)


def kept_table(rows: Sequence[Row], usual: Setting) -> str:
    """Admitted: not refused at submit."""
    lines = []
    for rate in sorted({row["rate"] for row in rows}):
        own = {row["policy"]: row for row in rows if row["rate"] == rate}
        lines.append([f"{rate:,.0f}", *(kept(own.get(name), usual) for name in policies_in(rows))])
    return table(["offered", *policies_in(rows)], lines)


def kept(row: Row | None, usual: Setting) -> str:
    if row is None:
        return ""
    p99_us = row["latency_p99_us"]
    share = "-" if p99_us is None else f"{100 * p99_us * 1e3 / usual.slo_ns:.0f}%"
    return f"{share}, {100 * admitted_in_time(row):.1f}%"


def burst_table(rows: Sequence[Row], usual: Setting) -> str:
    lines = []
    for name in policies_in(rows):
        (row,) = (row for row in rows if row["policy"] == name)
        back = row["recovered_after_ms"]
        slos = "never" if back is None else f"{back:g} ms, {back * 1e6 / usual.slo_ns:.1f} SLOs"
        shares = [f"{100 * row[f'attainment_{when}']:.1f}%" for when in ("before", "after", "last")]
        lines.append([name, slos, *shares])
    return table(["policy", "99% again after", "in time before it", "after it", "in the last half second"], lines)


def plot(path: Path, rows: Sequence[Row], usual: Setting) -> str:
    """Goodput by what is offered with the bound, and attainment over time around each burst; returns what to print."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'coalesce-jax[plot]')"
    lengths = sorted({row["burst_ms"] for row in rows if row["part"] == "burst"})
    figure = Figure(figsize=(5.5 * (1 + len(lengths)), 4.5), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(lengths), squeeze=False)[0]
    for name in policies_in(rows):
        own = [row for row in rows if (row["part"], row["policy"]) == ("offered", name)]
        points = sorted((row["rate"], row["goodput"]) for row in own)
        first.plot([x for x, _ in points], [y for _, y in points], marker=".", label=name, **style(name))
    first.axhline(usual.bound, color="grey", linewidth=0.8, linestyle=":")
    first.set(xlabel="requests a second", ylabel="results in time a second", xscale="log")
    for axes, burst_ms in zip(others, lengths, strict=True):
        for row in rows:
            if row["part"] != "burst" or row["burst_ms"] != burst_ms:
                continue
            shares = [None if share is None else 100 * share for share in row["attainment_by_bin"]]
            axes.plot([i * row["bin_ms"] for i in range(len(shares))], shares, **style(row["policy"]))
        axes.set(
            xlabel="ms, by arrival", ylabel="% in time", title=f"10 times as many for {burst_ms:g} ms", ylim=(0, 102)
        )
    for axes in (first, *others):
        axes.grid(alpha=0.3)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return f"plot: {path}"
