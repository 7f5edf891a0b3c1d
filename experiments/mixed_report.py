"""The text and the plot of a mixed_tenants result."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.results import Row, table

BASE = "per_family"  # what the times of a set are compared with
ALIKE = 0.02  # share of a round by which runs of one program differ


def report(head: Mapping[str, Any], rows: Sequence[Row]) -> str:
    settings = head["settings"]
    reasons = [f"- {row['set']}, {row['method']}: {row['failed']}" for row in rows if row["failed"]]
    sets = {row["set"]: f"- {row['set']}: {', '.join(row['models'])}" for row in rows}
    text = [
        "# One round of tenants of different architectures",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"{settings['dtype']}, batch {settings['batch']}, tenants of each model: {settings['lanes']}, padding of at "
        f"most {settings['waste_bound']:.0%} of an op. Not as published: {sizes_text(settings['fields'])}.",
        f"    {head['command']}",
        "\n".join(sets.values()),
        "Median microseconds a round, of each method's best configuration; in parentheses, how many times faster than "
        f"`{BASE}`, one fused program for each model.",
        time_table(rows),
        *(["\n".join(reasons)] if reasons else []),
        *(["Whether `auto` runs families side by side:", text] if (text := "\n".join(beside_lines(rows))) else []),
        "What packing across families was predicted to win a round over what packs nothing, `beside` where families "
        "run side by side and `never` where they do not, and what it won. Noise: twice the standard error of the "
        "medians' difference, with the spread of a normal distribution that has their p10 and p90, and at least "
        f"{ALIKE:.0%} of that round, as runs of one program differ by:",
        "\n".join(gain_lines(rows)) or "- nothing to compare",
        "The spread of the times, and what was fused:",
        detail_table(rows),
    ]
    return "\n\n".join(text) + "\n"


def sizes_text(fields: Mapping[str, Mapping[str, Any]]) -> str:
    """What was set of which models: `length=32 (bert_small, bert_base)`."""
    models: dict[str, list[str]] = {}
    for name, own in fields.items():
        for field, value in own.items():
            models.setdefault(f"{field}={value}", []).append(name)
    return "; ".join(f"{setting} ({', '.join(names)})" for setting, names in models.items())


def times_of(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Median by set and method, of those that did not fail."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["set"], {}).update({} if row["failed"] else {row["method"]: row["round_us_median"]})
    return found


def time_table(rows: Sequence[Row]) -> str:
    methods = list(dict.fromkeys(row["method"] for row in rows))

    def cell(times: Mapping[str, float], method: str) -> str:
        if method not in times:
            return "-"
        faster = f" ({times[BASE] / times[method]:.2f}x)" if BASE in times and method != BASE else ""
        return f"{times[method]:,.0f}{faster}"

    lines = [[name, *(cell(times, method) for method in methods)] for name, times in times_of(rows).items()]
    return table(["set", *methods], lines)


def gain_lines(rows: Sequence[Row]) -> Iterator[str]:
    """For each set and policy that packs across families."""
    found = {(row["set"], row["method"]): row for row in rows if not row["failed"]}
    for (name, method), row in found.items():
        facts = row.get("facts", {})
        base = "beside" if facts.get("side_by_side") else "never"  # that packs nothing, and runs in the same way
        other = found.get((name, base))
        if method not in ("auto", "launches", "always") or other is None:
            continue
        won = other["round_us_median"] - row["round_us_median"]
        measured = f"{won:+,.0f} us ({won / other['round_us_median']:+.1%})"
        if not facts["ops_across"]:
            same = f"so it is the program of `{base}`; what one program's times differ by"
            yield f"- {name}, {method}: packs nothing across families, {same}: {measured}"
            continue
        predicted = facts["predicted_gain_us"]
        yield (
            f"- {name}, {method}: {facts['superkernels_across']} superkernels across families with "
            f"{facts['ops_across']} ops, joint loops: {facts['loops_across']}; predicted {predicted:+,.0f} us, "
            f"measured {measured}; {verdict(predicted, won, noise_of(row, other))}"
        )


def noise_of(row: Row, other: Row) -> float:
    """What medians of rounds may differ by where two programs are as quick as each other."""
    return max(2 * math.hypot(median_error(row), median_error(other)), ALIKE * other["round_us_median"])


def beside_lines(rows: Sequence[Row]) -> Iterator[str]:
    """For each set, what `auto` chose and by which times."""
    for row in rows:
        if row["method"] == "auto" and not row["failed"] and (why := row["facts"].get("why_side_by_side")):
            yield f"- {row['set']}: {why}"


def median_error(row: Row) -> float:
    """The standard error of a median, if rounds are independent and normal: p90 - p10 is 2.563 deviations then."""
    deviation = (row["round_us_p90"] - row["round_us_p10"]) / 2.563
    return math.sqrt(math.pi / 2 / row["repeats"]) * deviation


def verdict(predicted: float, won: float, noise: float) -> str:
    if abs(won) < noise:
        return "within the noise" if abs(predicted) < noise else "within the noise, though more was predicted"
    if abs(predicted) < 0.5:
        return "nothing was predicted"
    if won * predicted < 0:
        return "the sign is wrong"
    times = max(won / predicted, predicted / won)
    size = f"{times:{'.2g' if times < 10 else ',.0f'}} times too {'small' if abs(predicted) < abs(won) else 'large'}"
    return f"the sign is right, the size {size}" if not size.startswith("1 ") else "the sign is right, and the size"


def detail_table(rows: Sequence[Row]) -> str:
    columns = ["set, method", "p10", "median", "p90", "rounds", "compile s", "error", "heavy ops", "superkernels"]
    lines = []
    for row in rows:
        facts = row.get("facts", {})
        how = ", ".join(filter(None, [row.get("how", ""), json.dumps(o) if (o := row.get("options")) else ""]))
        name = ", ".join(filter(None, [row["set"], row["method"], how]))
        spread = [f"{row[f'round_us_{q}']:,.0f}" if not row["failed"] else "-" for q in ("p10", "median", "p90")]
        counts = [str(facts.get(key, "")) for key in ("heavy_ops", "superkernels", "superkernels_across", "ops_across")]
        padding = f"{facts['padding']:.1%}" if facts else ""
        rounds, error = str(row.get("repeats", "-")), f"{row['error']:.0e}" if not row["failed"] else "-"
        lines.append([name, *spread, rounds, f"{row['compile_s']:.0f}", error, *counts, padding])
    return table([*columns, "across families", "ops in them", "padding"], lines)


def plot(path: Path, rows: Sequence[Row]) -> str:
    """A group of bars for each set: times relative to BASE, with p10 and p90; returns what to print."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'coalesce-jax[plot]')"
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    times = {name: own for name, own in times_of(rows).items() if BASE in own}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    width = 0.8 / len(methods)
    for place, method in enumerate(methods):
        mine = [r for r in rows if r["method"] == method and not r["failed"] and r["set"] in times]
        at = [list(times).index(row["set"]) + (place - (len(methods) - 1) / 2) * width for row in mine]
        middle, low, high = (
            [row[f"round_us_{q}"] / times[row["set"]][BASE] for row in mine] for q in ("median", "p10", "p90")
        )
        below = [m - x for m, x in zip(middle, low, strict=True)]
        above = [x - m for m, x in zip(middle, high, strict=True)]
        axes.bar(at, middle, width, yerr=[below, above], label=method, error_kw={"elinewidth": 0.8})
    axes.axhline(1, color="0.5", linewidth=0.8)
    axes.set_xticks(range(len(times)), list(times))
    axes.set(title="One round of tenants of different architectures", ylabel=f"time, {BASE} = 1")
    axes.legend(frameon=False, ncols=len(methods))
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return f"plot: {path}"
