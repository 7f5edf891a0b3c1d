"""The tables and the plot of slo_attainment on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.results import Row, table
from experiments.simulated import POLICIES
from experiments.slo_probe import admitted_in_time, LINE
from experiments.slo_real import ELSEWHERE
from experiments.slo_report import style

OURS, PEER = "coalescing", "torch_edf"


def policies_in(rows: Sequence[Row]) -> list[str]:
    found = {row["policy"] for row in rows}
    first, *others = POLICIES
    return [name for name in (first, ELSEWHERE, *others, PEER) if name in found]


def report(head: Mapping[str, Any], rows: Sequence[Row], why: str = "") -> str:
    """`why` the peer does not run here, if it does not."""
    settings, first = head["settings"], rows[0]
    whose = "a request alone in the runtime" if settings["alone"] == "request" else "the jitted program alone"
    slos = [
        f"{name}: {alone_us / 1e3:.3f} ms alone, SLO {slo_us / 1e3:.3f} ms"
        for name, alone_us, slo_us in zip(settings["models"], first["alone_us"], first["slo_us"], strict=True)
    ]
    text = [
        f"# Requests in time: {settings['tenants']} tenants of {', '.join(settings['models'])}, {settings['dtype']}",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        f"The SLO is {settings['slo_scale']:g} times what {whose} takes, from submit to result, for who waits: "
        f"{'; '.join(slos)}. Requests are submitted at the times of Gamma processes, one a tenant, by a thread of the "
        f"same process. A rate is tried for {settings['probe_s']:g} s; the best of {settings['tries']} tries counts in "
        "a search. *One by one*: the same runtime without coalescing. *Elsewhere*: the policy in a process of its own. "
        "*torch_edf*: a PyTorch CUDA graph a tenant behind an EDF queue.",
    ]
    found = [row for row in rows if row["kind"] == "search"]
    text += [
        f"## The rate at which {100 * LINE:.0f}% of the requests are in time",
        search_table(found),
        f"In parentheses, how many times that {OURS} serves. *Bound*: of the device with these executables, for any "
        "scheduler.",
    ] * bool(found)
    text += [f"{PEER} is missing: {why}."] * bool(why)
    at_rates = [row for row in rows if row["kind"] == "rate"]
    text += [
        "## At given rates, in turns",
        rates_table(at_rates),
        "The middle one of its tries, and from the least to the most of all of them. *p99 of results*: of what was "
        "admitted and has one. *Admitted in time*: whoever was admitted and dropped later is not.",
    ] * bool(at_rates)
    over = [row for row in rows if row["kind"] == "overload"]
    text += ["## More than that", overload_table(over)] * bool(over)
    for cv in sorted({row["cv"] for row in rows}):
        own = [row for row in rows if row["kind"] == "load" and row["cv"] == cv]
        text += [f"## Share in time by rate, CV {cv:g}", rate_table(own)] * bool(own)
    return "\n\n".join(text) + "\n"


def search_table(rows: Sequence[Row]) -> str:
    """Beside each rate how many times that ours is."""
    names, lines = policies_in(rows), []
    for cv in sorted({row["cv"] for row in rows}):
        own = {row["policy"]: row for row in rows if row["cv"] == cv}
        ours = own[OURS]["rate"] if OURS in own else 0.0
        cells = [rate_of(own[name], ours) if name in own else "" for name in names]
        bounds = [row["bound"] for row in own.values() if "bound" in row]
        lines.append([f"{cv:g}", *cells, f"{max(bounds):,.0f}" if bounds else ""])
    return table(["CV", *names, "bound"], lines)


def rate_of(row: Row, ours: float) -> str:
    if row.get("unfinished"):
        return f"over {row['rate']:,.0f}, not finished"
    times = f" ({ours / row['rate']:.1f}x)" if row["policy"] != OURS and row["rate"] and ours else ""
    return f"{row['rate']:,.0f}{times}"


def overload_table(rows: Sequence[Row]) -> str:
    """Admitted: not refused at submit."""
    lines = [
        [row["policy"], f"{row['cv']:g}", f"{row['value']:g}x", f"{row['rate']:,.0f}", *ends(row, " of the SLO")]
        for row in in_order(rows)
    ]
    columns = ["policy", "CV", "of its rate", "requests a second", "in time", "p99 of results", "refused at submit"]
    return table([*columns, "admitted in time"], lines)


def rates_table(rows: Sequence[Row]) -> str:
    """Policies beside each other at every rate."""
    lines = [[row["policy"], f"{row['cv']:g}", f"{row['value']:,.0f}", *ends(row)] for row in in_order(rows)]
    columns = ["policy", "CV", "requests a second", "in time", "p99 of results, of the SLO", "refused at submit"]
    return table([*columns, "admitted in time"], lines)


def in_order(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["cv"], row["value"], policies_in(rows).index(row["policy"])))


def ends(row: Row, unit: str = "") -> list[str]:
    """How its requests ended: in time a second, the p99 of results, the shares that were refused, and kept."""
    share = row["slo_share_p99"]
    return [
        f"{row['goodput']:,.0f}{around(row, 'goodput', 1, ',.0f')}",
        "-" if share is None else f"{100 * share:.0f}%{unit}{around(row, 'slo_share_p99', 100, '.0f')}",
        f"{100 * row['refused'] / max(1, row['requests']):.1f}%",
        f"{100 * admitted_in_time(row):.1f}%{around(row, 'kept', 100, '.1f')}",
    ]


def around(row: Row, key: str, unit: float, form: str) -> str:
    """The range of all tries, if there were several."""
    found = [unit * one[key] for one in row.get("tries", ()) if one[key] is not None]
    return f" ({min(found):{form}} to {max(found):{form}})" if len(found) > 1 else ""


def rate_table(rows: Sequence[Row]) -> str:
    names, lines = policies_in(rows), []
    for load in sorted({row["value"] for row in rows}):
        own = {row["policy"]: row for row in rows if row["value"] == load}
        cells = [shown(own[name]) if name in own else "" for name in names]
        lines.append([f"{next(iter(own.values()))['rate']:,.0f}", *cells])
    columns = [f"{name}: in time, p99 ms, lanes a bundle" for name in names]
    return table(["requests a second", *columns], lines)


def shown(row: Row) -> str:
    p99 = f"{row['latency_p99_us'] / 1e3:.2f}" if row["latency_p99_us"] is not None else "-"
    lanes = f"{row['lanes_a_bundle']:.1f}" if row["lanes_a_bundle"] is not None else "-"
    return f"{100 * row['attainment']:.1f}%, {p99}, {lanes}"


def plot(path: Path, rows: Sequence[Row]) -> str:
    """Attainment by rate with the 99% line, a panel for each CV, wherever a rate was tried; returns what to print."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'coalesce-jax[plot]')"
    tried = [row for row in rows if row.get("attainment")]
    if not tried:
        return "no plot: no rate was good"
    cvs = sorted({row["cv"] for row in tried})
    figure = Figure(figsize=(5.5 * len(cvs), 4), layout="constrained")
    for axes, cv in zip(figure.subplots(1, len(cvs), squeeze=False)[0], cvs, strict=True):
        for name in policies_in(rows):
            own = [row for row in tried if (row["cv"], row["policy"]) == (cv, name)]
            points = sorted((row["rate"], 100 * row["attainment"]) for row in own)
            axes.plot([x for x, _ in points], [y for _, y in points], marker=".", label=name, **line(name))
        axes.axhline(100 * LINE, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=f"CV {cv:g}", xlabel="requests a second", ylabel="% in time", xscale="log", ylim=(0, 102))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return f"plot: {path}"


def line(name: str) -> dict[str, Any]:
    if name == PEER:
        return {"color": "black", "linewidth": 1.2}
    return {**style(OURS), "linestyle": "--"} if name == ELSEWHERE else style(name)
