"""The text and the figure of an isolation result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.results import Row, table


def report(title: str, head: Mapping[str, Any], rows: Sequence[Row]) -> str:
    whys = {(row["method"], row["failed"]) for row in rows if row["failed"]}
    reasons = [f"- {method}: {why}" for method, why in sorted(whys)]
    text = [
        f"# {title}",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        "Milliseconds; every tenant has one request under way at any time. `spread` is p99 over the median of all "
        "requests, `between` the median of the slowest tenant over that of the fastest.",
        method_table(rows),
        *(["\n".join(reasons)] if reasons else []),
    ]
    return "\n\n".join(text) + "\n"


def method_table(rows: Sequence[Row]) -> str:
    lines = [
        [
            str(row["tenants"]),
            row["method"],
            f"{row['requests']:,}",
            f"{row['p50_ms']:.3f}",
            f"{row['p90_ms']:.3f}",
            f"{row['p99_ms']:.3f}",
            f"{row['p99_ms'] / row['p50_ms']:.2f}",
            f"{row['slowest_tenant_p50_ms'] / row['fastest_tenant_p50_ms']:.2f}",
        ]
        for row in rows
        if not row["failed"]
    ]
    return table(["tenants", "method", "requests", "p50", "p90", "p99", "spread", "between"], lines)


def plot(path: Path, title: str, rows: Sequence[Row]) -> str:
    """Medians with their p10 to p99 band; returns what to print."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'coalesce-jax[plot]')"
    good = [row for row in rows if not row["failed"]]
    if not good:
        return "no plot: nothing ran"
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in good):
        own = sorted((row for row in good if row["method"] == method), key=lambda row: row["tenants"])
        at = [row["tenants"] for row in own]
        axes.plot(at, [row["p50_ms"] for row in own], marker="o", label=method)
        axes.fill_between(at, [row["p10_ms"] for row in own], [row["p99_ms"] for row in own], alpha=0.15)
    ticks = sorted({row["tenants"] for row in good})
    axes.set(title=title, xlabel="tenants", ylabel="milliseconds, median with p10 to p99", xscale="log", yscale="log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return f"plot: {path}"
