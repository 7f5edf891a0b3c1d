"""The text and the plots of a multiplexing result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from experiments.pairs import IN_A_ROW, OURS
from experiments.results import Row, table

SUSTAINED = (
    f"Sustained: microseconds a round where {IN_A_ROW} are issued one after the other and the last one is waited for, "
    "by processes as many as a burst has; each in the configuration above."
)
PEERS = ("time", "space", "user")


def report(head: Mapping[str, Any], rows: Sequence[Row]) -> str:
    text = [
        "# Coalesce and its peers, one round of n tenants",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        "Median microseconds a round, of each method's best configuration; in parentheses, how many times that of "
        f"`{OURS}`, which took turns with it. `{OURS}` itself: the median over its pairs. A request's "
        "latency counts from the start of its round; that of a process, which never waits for a round, from its own.",
    ]
    cells = dict.fromkeys((row["model"], row["dtype"], row["batch"]) for row in rows)
    for model, dtype, batch in cells:
        own = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        text += [f"## {model}, {dtype}, batch {batch}", round_table(own)]
        if any("sustained_us_median" in row for row in own):
            text += [SUSTAINED, round_table(own, "sustained_us_median")]
        text += ["\n".join(reasons(own))] * any(row["failed"] for row in own)
        text += [detail_table(own)]
    return "\n\n".join(text) + "\n"


class Times:
    """Medians of one model and dtype: `of(n, method)`, and `faster(n, method)` within its pair."""

    def __init__(self, rows: Sequence[Row], key: str = "round_us_median") -> None:
        self.key = key
        self.worked = [row for row in rows if not row["failed"] and key in row]
        self.kinds = {row["method"]: row["kind"] for row in rows}
        self.counts = sorted({row["tenants"] for row in rows})

    def of(self, count: int, method: str) -> float | None:
        found = [r[self.key] for r in self.worked if (r["tenants"], r["method"]) == (count, method)]
        return median(found) if found else None

    def faster(self, count: int, method: str) -> float | None:
        """How many times as fast Coalesce is."""
        pair = {r["method"]: r for r in self.worked if (r["tenants"], r["pair"]) == (count, method)}
        if method not in pair or OURS not in pair:
            return None
        return pair[method][self.key] / pair[OURS][self.key]

    def best(self, count: int, kind: str) -> str | None:
        """The fastest method of a kind."""
        times = {m: us for m, of in self.kinds.items() if of == kind and (us := self.of(count, m)) is not None}
        return min(times, key=lambda m: times[m]) if times else None


def round_table(rows: Sequence[Row], key: str = "round_us_median") -> str:
    """A line for each method, a column for each number of tenants; then what follows from them."""
    times = Times(rows, key)

    def cell(count: int, method: str) -> str:
        if (us := times.of(count, method)) is None:
            return "-"
        ratio = times.faster(count, method) if method != OURS else None
        return f"{us:,.0f}" + (f" ({ratio:.2f}x)" if ratio else "")

    lines = [[f"{m} ({kind})", *(cell(n, m) for n in times.counts)] for m, kind in times.kinds.items() if m != OURS]
    lines.append([OURS, *(cell(n, OURS) for n in times.counts)])
    for kind in PEERS:
        best = [times.best(n, kind) for n in times.counts]
        ratios = [times.faster(n, m) if m else None for n, m in zip(times.counts, best, strict=True)]
        lines.append([f"over the best {kind}", *(f"{ratio:.2f}x" if ratio else "-" for ratio in ratios)])
    lines.append(["of the floor", *(share(times, n) for n in times.counts)])
    return table(["tenants", *map(str, times.counts)], lines)


def share(times: Times, count: int) -> str:
    floor, ours = times.of(count, "floor"), times.of(count, OURS)
    return f"{floor / ours:.0%}" if floor and ours else "-"


def reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Why rows have no number, each reason once."""
    counts: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row["failed"]:
            counts.setdefault((row["method"], row["failed"]), []).append(row["tenants"])
    for (method, reason), tenants in counts.items():
        yield f"- {method} with {', '.join(map(str, sorted(set(tenants))))} tenants: {reason}"


def detail_table(rows: Sequence[Row]) -> str:
    """The spread of the times and the configuration that they are of."""
    lines = []
    for row in rows:
        if row["failed"]:
            continue
        tried = next((t for t in row.get("tried", ()) if t.get("chosen")), {})
        options = json.dumps(tried["options"]) if tried.get("options") else ""
        pair = f" against {row['pair']}" if row["method"] == OURS != row["pair"] else ""
        name = ", ".join(filter(None, [str(row["tenants"]), row["method"] + pair, row["how"], options]))
        spread = [f"{row[key]:,.0f}" for key in ("round_us_p10", "round_us_median", "round_us_p90", "latency_p99_us")]
        lines.append([name, *spread, str(row.get("repeats", "-")), f"{row['error']:.0e}"])
    columns = ["tenants, method", "p10", "median", "p90", "latency p99", "turns", "error"]
    return table(columns, lines) if lines else "Nothing ran."


def plot(path: Path, title: str, rows: Sequence[Row]) -> str:
    """Time a round, and throughput relative to the best time multiplexing, against tenants; returns what to print."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'coalesce-jax[plot]')"
    times = Times(rows)
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = {n: us for n in times.counts if (m := times.best(n, "time")) and (us := times.of(n, m))}
    styles = {"time": ":", "space": "--", "user": "-.", OURS: "-", "floor": "-"}
    for method, kind in times.kinds.items():
        found = {n: us for n in times.counts if (us := times.of(n, method)) is not None}
        if not found:
            continue
        look: dict[str, Any] = {
            "marker": "o",
            "markersize": 4,
            "linestyle": styles[kind],
            "label": f"{method} ({kind})",
        }
        look |= {"linewidth": 2.5, "color": "black"} if method == OURS else {}
        look |= {"color": "0.6"} if method == "floor" else {}
        left.plot(list(found), list(found.values()), **look)
        both = [n for n in found if n in base and found[n] > 0]
        right.plot(both, [base[n] / found[n] for n in both], **look)
    if not base:  # nobody to compare with was measured, and an axis of logarithms wants a number
        right.remove()
    labelled = ((left, "microseconds a round"), (right, "throughput, best time multiplexing = 1"))
    for axes, label in labelled if base else labelled[:1]:
        axes.set(xlabel="tenants", ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(times.counts, [str(count) for count in times.counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return f"plot: {path}"
