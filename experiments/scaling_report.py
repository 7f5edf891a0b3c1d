"""The text of a tenant_scaling result: its tables, and why a row has no number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.results import Row, table


def report(title: str, head: Mapping[str, Any], rows: Sequence[Row]) -> str:
    reasons = [f"- {row['method']} with {row['tenants']} tenants: {row['failed']}" for row in rows if row["failed"]]
    text = [
        f"# {title}",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        "Median microseconds a round, for each method its best configuration; in parentheses, how many times that of "
        "`fused`.",
        method_table(rows),
        *(["\n".join(reasons)] if reasons else []),
        "Every configuration that was tried, by the number of tenants:",
        configuration_table(rows),
    ]
    return "\n\n".join(text) + "\n"


def method_table(rows: Sequence[Row]) -> str:
    """A line for each number of tenants, a column for each method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["tenants"], row["method"]): row.get("round_us_median") for row in rows}

    def cell(count: int, method: str) -> str:
        mine, base = found.get((count, method)), found.get((count, "fused"))
        if mine is None:
            return "-"
        return f"{mine:,.0f}" + (f" ({mine / base:.2f}x)" if base and method != "fused" else "")

    counts = sorted({row["tenants"] for row in rows})
    return table(["tenants", *methods], [[str(n), *(cell(n, method) for method in methods)] for n in counts])


def configuration_table(rows: Sequence[Row]) -> str:
    """A line for each configuration, a column for each number of tenants."""
    counts = sorted({row["tenants"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines: dict[str, dict[int, str]] = {}
    for row in sorted(rows, key=lambda row: methods.index(row["method"])):
        for tried in row.get("tried", ()):
            options = json.dumps(tried["options"]) if tried["options"] else ""
            name = ", ".join(filter(None, [row["method"], tried["how"], options]))
            median = tried.get("round_us_median")
            lines.setdefault(name, {})[row["tenants"]] = f"{median:,.0f}" if median else "failed"
    cells = [[name, *(line.get(n, "-") for n in counts)] for name, line in lines.items()]
    return table(["configuration", *map(str, counts)], cells)
