"""The text of a shape_clusters result: its two tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.results import Row, table


def report(head: Mapping[str, Any], rows: Sequence[Row], clusters: Sequence[Row]) -> str:
    """`rows` by bound, and the clusters that `shape_clusters.cluster_rows` gives."""
    settings = head["settings"]
    when = f"Shapes alone, no device; JAX {head['versions']['jax']}, {head['date']}"
    if "function" in settings:
        whose = f"the tenants of {settings['function']}"
        how = f"{when}. Every family of tenants counts as a model and an architecture, by the name of its first tenant."
    else:
        whose = "all models"
        how = (
            f"{when}; batch {settings['batch']}, {settings['dtype']}. Models that differ in size alone (ResNet-18 and "
            "ResNet-50) are one architecture; SE-ResNet-50 and SENet-154 are another."
        )
    text = [
        f"# Clusters of near-equal shape among {whose}",
        how,
        f"    {head['command']}",
        "For each bound: the share of all FLOPs that is padding when every op runs at the shape of its cluster, and of "
        "the one op that pads most; how many ops are in one cluster with ops of another model, and of another "
        "architecture; and the share of the FLOPs that those latter clusters have.",
        bound_table(rows),
        f"Clusters of two or more architectures at a bound of {head['waste_bound']:.0%}, the most FLOPs first, as M x "
        "N x K, with the other shapes in them:",
        cluster_table(clusters),
    ]
    return "\n\n".join(text) + "\n"


def bound_table(rows: Sequence[Row]) -> str:
    columns = ["bound", "clusters", "padding", "most of an op", "ops", "with another model", "architecture", "FLOPs"]
    lines = [
        [
            f"{row['bound']:.0%}",
            str(row["clusters"]),
            f"{row['padding']:.1%}",
            f"{row['largest_padding']:.1%}",
            str(row["ops"]),
            str(row["ops_with_another_model"]),
            str(row["ops_with_another_architecture"]),
            f"{row['flops_with_another_architecture']:.1%}",
        ]
        for row in rows
    ]
    return table(columns, lines)


def cluster_table(clusters: Sequence[Row]) -> str:
    lines = [
        [
            size(found["shape"]),
            str(sum(found["models"].values())),
            f"{found['padding']:.1%}",
            ", ".join(map(size, found["others"])),
            ", ".join(f"{model} {count}" for model, count in found["models"].items()),
        ]
        for found in clusters
    ]
    return table(["shape", "ops", "padding", "other shapes", "ops of each model"], lines)


def size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
