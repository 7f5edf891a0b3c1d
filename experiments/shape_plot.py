"""The figure of shape_clusters: shapes from three sides, and padding by bound."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from experiments.results import Row

MARKERS = "osD^v<>PX*hp"
SIDES = (("m", "n"), ("m", "k"), ("n", "k"))


def plot(path: Path, rows: Sequence[Row], shapes: Sequence[Row], architectures: Mapping[str, str], bound: float) -> str:
    """Shapes as `shape_clusters.shape_rows` gives them, rows by bound; returns what to print."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'coalesce-jax[plot]')"
    figure = Figure(figsize=(12, 9), layout="constrained")
    *panels, last = figure.subplots(2, 2).flat
    company: dict[int, set[str]] = {}
    for shape in shapes:
        company.setdefault(shape["cluster"], set()).add(architectures[shape["model"]])
    shared = [index for index, names in company.items() if len(names) > 1]
    colours = {index: colour(place) for place, index in enumerate(shared)}
    names = list(dict.fromkeys(architectures[shape["model"]] for shape in shapes))
    for axes, (x, y) in zip(panels, SIDES, strict=True):
        for name, marker in zip(names, cycle(MARKERS), strict=False):
            mine = [shape for shape in shapes if architectures[shape["model"]] == name]
            scatter(axes, mine, x, y, marker, colours)
        axes.set(xlabel=x.upper(), ylabel=y.upper(), xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    draw_bounds(last, rows)
    for name, marker in zip(names, cycle(MARKERS), strict=False):
        panels[0].scatter([], [], marker=marker, color="0.4", label=name)
    panels[0].legend(frameon=False, fontsize="small", ncols=2)
    figure.suptitle(
        f"Every dot and convolution as M x N x K; bound {bound:.0%}\n"
        "one colour for each cluster of two or more architectures, grey for the others; area by the number of ops"
    )
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return f"plot: {path}"


def scatter(axes: Any, shapes: Sequence[Row], x: str, y: str, marker: str, colours: Mapping[int, Any]) -> None:
    for together in (False, True):  # what is shared lies on top
        some = [shape for shape in shapes if (shape["cluster"] in colours) == together]
        edges = [colours.get(shape["cluster"], (0.7, 0.7, 0.7)) for shape in some]
        axes.scatter(
            [shape[x] for shape in some],
            [shape[y] for shape in some],
            s=[20 + 8 * shape["ops"] for shape in some],
            c=[(*edge, 0.25) for edge in edges],
            edgecolors=edges,
            marker=marker,
            zorder=2 + together,
        )


def colour(place: int) -> tuple[float, float, float]:
    """Hues far apart, however many there are: steps of the golden ratio."""
    return colorsys.hsv_to_rgb(place * 0.618 % 1, 0.8, 0.9)


def draw_bounds(axes: Any, rows: Sequence[Row]) -> None:
    at = [100 * row["bound"] for row in rows]
    lines = {
        "FLOPs that are padding": [row["padding"] for row in rows],
        "ops with another architecture": [row["ops_with_another_architecture"] / row["ops"] for row in rows],
        "ops with another model": [row["ops_with_another_model"] / row["ops"] for row in rows],
    }
    for name, values in lines.items():
        axes.plot(at, [100 * value for value in values], marker="o", label=name)
    counts = axes.twinx()
    counts.plot(at, [row["clusters"] for row in rows], marker="s", color="0.5", label="clusters (right)")
    counts.set(ylabel="clusters", ylim=(0, None))
    axes.set(xlabel="bound on the padding of an op, %", ylabel="%", ylim=(0, None))
    axes.grid(alpha=0.3)
    handles = [line for panel in (axes, counts) for line in panel.get_lines()]
    axes.legend(handles=handles, frameon=False, fontsize="small", loc="center left")
