"""The text, the summary and the plots of coalesced_sgemm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from experiments.pairs import OURS
from experiments.results import Row, table

IN_TURN = "jax_in_turn"
SUMMARY = "summary"
LOOKS: dict[str, dict[str, Any]] = {OURS: {"color": "black", "linewidth": 2.5}, "floor": {"color": "0.6"}}
INSIDE = ("kernel", "library", "floor")  # kinds; the others are of calls


class Times:
    """Of one product and arithmetic: microseconds by method and number of problems."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.worked = [row for row in rows if not row["failed"]]
        self.kinds = {row["method"]: row["kind"] for row in rows}
        self.counts = sorted({row["problems"] for row in rows})

    def of(self, method: str, count: int) -> float | None:
        found = [r["round_us_median"] for r in self.worked if (r["method"], r["problems"]) == (method, count)]
        return median(found) if found else None  # Coalesce has one in each of its pairs

    def faster(self, peer: str, count: int) -> float | None:
        """How many times as fast Coalesce is, within its pair."""
        pair = {r["method"]: r["round_us_median"] for r in self.worked if (r["asked"], r["problems"]) == (peer, count)}
        return pair[peer] / pair[OURS] if peer in pair and OURS in pair else None

    def best(self, kind: str, count: int) -> str | None:
        """The fastest method of a kind."""
        found = {m: us for m, of in self.kinds.items() if of == kind and (us := self.of(m, count)) is not None}
        return min(found, key=lambda method: found[method]) if found else None


def summaries(rows: Sequence[Row]) -> list[Row]:
    """For each product and arithmetic, what follows from the times; numbers of problems are keys."""
    return [
        {"product": product, "arithmetic": arithmetic, "problems": 0, "asked": SUMMARY, "method": SUMMARY}
        | {"kind": SUMMARY, "failed": "", **summary(Times(own))}
        for (product, arithmetic), own in parts(rows)
    ]


def summary(times: Times) -> dict[str, Any]:
    ratios = {n: faster for n in times.counts if n > 1 and (faster := times.faster(IN_TURN, n))}
    best = {n: name for n in times.counts if (name := times.best("kernel", n))}
    share = {n: ratio(times.of("floor", n), times.of(name, n)) for n, name in best.items()}
    library = {n: ratio(times.of("cublas_batched", n), times.of(name, n)) for n, name in best.items()}
    return {
        "over_jax_in_turn": {str(n): round(value, 3) for n, value in ratios.items()},
        "over_jax_in_turn_geometric_mean": round(geometric_mean(ratios.values()), 3) if ratios else None,
        "best_kernel": {str(n): name for n, name in best.items()},
        "best_kernel_of_floor": {str(n): value for n, value in share.items() if value},
        "best_kernel_over_cublas_batched": {str(n): value for n, value in library.items() if value},
    }


def ratio(one: float | None, other: float | None) -> float | None:
    return round(one / other, 3) if one and other else None


def parts(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    for key in dict.fromkeys((row["product"], row["arithmetic"]) for row in rows):
        yield key, [row for row in rows if (row["product"], row["arithmetic"]) == key]


def report(head: Mapping[str, Any], rows: Sequence[Row], found: Sequence[Row]) -> str:
    text = [
        "# Products coalesced: rounds of calls, and kernels inside a program",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        "Microseconds for n problems. Calls, dispatch included: in parentheses, how many times that of `coalesced`, "
        "which took turns with them; `coalesced` itself is the median of its pairs. Inside a program, a kernel's own "
        "time: in parentheses, the share of the floor.",
    ]
    for ((product, arithmetic), own), totals in zip(parts(rows), found, strict=True):
        m, k, n = head["settings"]["sizes"][product]
        text += [f"## {product} (M={m} K={k} N={n}), {arithmetic}", time_table(Times(own))]
        text += ["\n".join(conclusions(totals))] * any(conclusions(totals))
        text += ["\n".join(reasons(own))] * any(row["failed"] for row in own)
    return "\n\n".join(text) + "\n"


def time_table(times: Times) -> str:
    def cell(method: str, count: int) -> str:
        us, least = times.of(method, count), times.of("floor", count)
        if us is None:
            return "-"
        if times.kinds[method] in ("kernel", "library"):
            return f"{us:,.1f}" + (f" ({least / us:.0%})" if least else "")
        faster = times.faster(method, count)
        return f"{us:,.1f}" + (f" ({faster:.2f}x)" if faster else "")

    inside = [m for m, kind in times.kinds.items() if kind in INSIDE]
    calls = [m for m in times.kinds if m not in inside]
    ordered = [*sorted(calls, key=lambda method: method == OURS), *inside]
    lines = [[f"{m} ({times.kinds[m]})", *(cell(m, n) for n in times.counts)] for m in ordered]
    return table(["problems", *map(str, times.counts)], lines)


def conclusions(totals: Row) -> list[str]:
    text: list[str] = []
    if mean := totals["over_jax_in_turn_geometric_mean"]:
        counts = ", ".join(totals["over_jax_in_turn"])
        text.append(f"- JAX calls in turn over one coalesced call, geometric mean over {counts} problems: {mean:.2f}x.")
    if share := totals["best_kernel_of_floor"]:
        each = ", ".join(f"{value:.0%} at {n}" for n, value in share.items())
        text.append(f"- The best kernel of ours inside a program, of the floor: {each}.")
    if over := totals["best_kernel_over_cublas_batched"]:
        each = ", ".join(f"{value:.2f}x at {n}" for n, value in over.items())
        text.append(f"- cuBLAS batched over the best kernel of ours: {each}.")
    if names := totals["best_kernel"]:
        text.append("- The best kernel of ours: " + ", ".join(f"{name} at {n}" for n, name in names.items()) + ".")
    return text


def reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Why rows have no number, each reason once."""
    counts: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row["failed"]:
            counts.setdefault((row["method"], row["failed"]), []).append(row["problems"])
    for (method, reason), of in counts.items():
        yield f"- {method} with {', '.join(map(str, sorted(of)))} problems: {reason}"


def plot(path: Path, product: str, sizes: Sequence[int], rows: Sequence[Row]) -> str:
    """TFLOP/s against the number of problems, as calls and inside a program; returns what to print."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'coalesce-jax[plot]')"
    cells = list(parts(rows))
    figure = Figure(figsize=(5 * len(cells), 8), layout="constrained")
    axes = figure.subplots(2, len(cells), squeeze=False, sharey="col")
    for column, ((_, arithmetic), own) in enumerate(cells):
        times = Times(own)
        for method, kind in times.kinds.items():
            points = {n: us for n in times.counts if (us := times.of(method, n)) is not None}
            rates = [2 * prod(sizes) * n / us / 1e6 for n, us in points.items()]
            look = LOOKS.get(OURS if method == OURS else kind, {})
            if points:
                axes[int(kind in INSIDE), column].plot([*points], rates, marker="o", markersize=4, label=method, **look)
        for row, what in enumerate(("rounds of calls", "inside a program")):
            at = axes[row, column]
            at.set(title=f"{arithmetic}, {what}", xlabel="problems", ylabel="TFLOP/s", xscale="log", yscale="log")
            at.set_xticks(times.counts, [str(count) for count in times.counts])
            at.xaxis.set_minor_locator(NullLocator())
            at.grid(alpha=0.3)
            if at.lines:
                at.legend(frameon=False, fontsize="x-small")
    figure.suptitle(f"{product}: M={sizes[0]} K={sizes[1]} N={sizes[2]}")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return f"plot: {path}"
