"""The text and the plot of a cost_error result: how far predictions are from measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.results import Row, table

COLUMNS = ["class", "n", "median", "p90", "median factor", "p90 factor", "bias"]


def name_of(row: Row) -> tuple[str, ...]:
    """What tells a case from the others."""
    return tuple(str(row[key]) for key in ("cls", "what", "dtype", "kernel", "groups"))


def fastest(new: Row, old: Row | None) -> Row:
    """The new prediction, and the faster one of two measurements."""
    times = [row["measured_us"] for row in (new, old) if row and "measured_us" in row]
    if not times:
        return {"failed": "not measured", **new}
    return {key: value for key, value in new.items() if key != "failed"} | {"measured_us": min(times)}


def report(head: Mapping[str, Any], rows: Sequence[Row], recorded: Sequence[Row]) -> str:
    good = [row for row in rows if not row.get("failed")]
    text = [
        f"# Cost model against measurement: {head['device']}",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        "Error: |predicted / measured - 1|. Factor: the larger of predicted / measured and measured / predicted. Bias: "
        "the geometric mean of predicted / measured.",
    ]
    if good:
        pairs = packed_against_alone(good)
        text += ["## Measured here", errors(good), "By number of problems in a pack:", errors(good, pack_size)]
        text += [f"{len(rows) - len(good)} cases were not measured."] if len(good) < len(rows) else []
        if others := sum(1 for row in good if row["kernel"] and not row.get("chosen")):
            text += [f"{others} cases are of kernels that the compiler does not take for them now."]
        text += [
            "Decisions rest on the time of a pack relative to its ops alone, each with the kernel that is chosen for "
            f"it: rank correlation (Spearman) of predicted and measured {rank_correlation(pairs):.2f} over "
            f"{len(pairs)} packs; {agreement(pairs):.0%} of them fall on the same side of 1."
        ]
    text += [
        "## Recorded on GPUs",
        "The H100's numbers were fitted to most of these figures: they show that the form of the model holds, not how "
        "well it predicts what it has not seen. `network`: the heavy ops and an elementwise tail for each, no pools.",
        errors(recorded),
        listing(recorded),
    ]
    text += ["## Every case measured here", listing(rows)] if rows else []
    return "\n\n".join(text) + "\n"


def pack_size(row: Row) -> str:
    return f"{row['groups']} problems" if row["kernel"] else "copies"


def kind(row: Row) -> str:
    return row["cls"]


def errors(rows: Sequence[Row], by: Callable[[Row], str] = kind) -> str:
    names = list(dict.fromkeys(map(by, rows)))
    groups = [(name, [row for row in rows if by(row) == name]) for name in names]
    return table(COLUMNS, [summary(name, group) for name, group in [*groups, ("all", list(rows))]])


def summary(name: str, rows: Sequence[Row]) -> list[str]:
    ratio = np.array([row["predicted_us"] / row["measured_us"] for row in rows])
    error, factor = np.abs(ratio - 1), np.maximum(ratio, 1 / ratio)
    shares = [f"{np.percentile(error, q):.0%}" for q in (50, 90)]
    factors = [f"{np.percentile(factor, q):.2f}x" for q in (50, 90)]
    return [name, str(len(rows)), *shares, *factors, f"{np.exp(np.mean(np.log(ratio))):.2f}"]


def packed_against_alone(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(predicted, measured) time of each pack, relative to its ops one by one."""
    chosen = {(row["what"], row["dtype"], row["groups"]): row for row in rows if row.get("chosen")}
    pairs = []
    for (what, dtype, groups), row in chosen.items():
        one = chosen.get((what, dtype, 1))
        if groups > 1 and one:
            pairs.append(tuple(row[key] / (groups * one[key]) for key in ("predicted_us", "measured_us")))
    return pairs


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's, equal values at the mean of their ranks."""
    if len(pairs) < 2:
        return float("nan")
    first, second = (ranks(np.array(side)) for side in zip(*pairs, strict=True))
    spread = first.std() * second.std()
    return float(((first - first.mean()) * (second - second.mean())).mean() / spread) if spread else float("nan")


def ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(np.sum(values < v) + np.sum(values <= v) - 1) / 2 for v in values])


def agreement(pairs: Sequence[tuple[float, float]]) -> float:
    return (
        float(np.mean([(predicted < 1) == (measured < 1) for predicted, measured in pairs])) if pairs else float("nan")
    )


def listing(rows: Sequence[Row]) -> str:
    columns = ["what", "class", "dtype", "n", "measured us", "predicted us", "predicted / measured"]
    lines = []
    for row in rows:
        names = [row["what"], row["cls"], row["dtype"], str(row["groups"])]
        predicted = f"{row['predicted_us']:,.1f}"
        if row.get("failed"):
            lines.append([*names, row["failed"], predicted, "-"])
        else:
            measured = row["measured_us"]
            lines.append([*names, f"{measured:,.1f}", predicted, f"{row['predicted_us'] / measured:.2f}"])
    return table(columns, lines)


def scatter(path: Path, title: str, rows: Sequence[Row]) -> str:
    """Predicted over measured, both in log, a colour for each class; returns what to print."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'coalesce-jax[plot]')"
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["cls"] for row in rows):
        points = [(row["measured_us"], row["predicted_us"]) for row in rows if row["cls"] == name]
        axes.scatter(*zip(*points, strict=True), s=14, alpha=0.7, label=name)
    ends = [f(row[key] for row in rows for key in ("measured_us", "predicted_us")) for f in (min, max)]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    for factor in (0.5, 2):
        axes.plot(ends, [factor * end for end in ends], color="black", linewidth=0.5, linestyle=":")
    axes.set(title=title, xlabel="measured, microseconds", ylabel="predicted", xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return f"plot: {path}"
