"""The table of the simulator against the real runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.results import Row, table

POINTS = 2.0  # of attainment, that the two may differ by


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
            f"{row['again']:+.2f}",
            f"{row['chance']:.2f}",
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
        "simulator gets the compared slices' own times: what is left is not the machine's being slower than around "
        "them. All arrivals are served twice, and `real` is the mean: `again` is by how many points the second time "
        "differs from the first, and `chance` the standard error of the mean, in points, by how much they differ in "
        "each slice.",
        table([*columns, "points", "hindsight", "again", "chance", "lanes", "lanes (sim)"], lines),
    ]
    return "\n\n".join(text) + "\n"
