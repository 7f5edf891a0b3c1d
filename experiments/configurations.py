"""What the simulator is compared with the real runtime on: drawn from a seed, for a machine of a kind."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple


class Configuration(NamedTuple):
    number: int
    model: str
    fields: dict[str, Any]
    tenants: int
    load: float  # 1 is what the device can do one request at a time
    cv: float
    slo: float  # in times that a request takes alone
    zipf: float
    segments: int


Models = tuple[tuple[str, dict[str, Any]], ...]

HALF = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
MODELS: dict[str, Models] = {
    "cpu": (
        ("mlp", {"width": 384, "layers": 24}),
        ("mlp", {"width": 512, "layers": 24}),
        ("gru", {"steps": 25, "hidden": 512, "features": 512, "classes": 10}),
    ),
    "gpu": (("resnet18", HALF), ("bert_small", HALF), ("mlp", {"width": 512, "layers": 24})),
}


def draw_configurations(models: Models, count: int, seed: int, most_segments: int) -> list[Configuration]:
    """Every number of tenants meets every kind of load; the rest is drawn."""
    rng = Random(seed)
    found = []
    for number in range(count):
        model, fields = models[number % len(models)]
        found.append(
            Configuration(
                number,
                model,
                fields,
                tenants=(2, 4, 8, 16)[number % 4],
                load=(0.3, 0.6, 0.9, 1.2, 1.6)[number % 5],
                cv=rng.choice((0.5, 1.0, 2.0, 4.0)),
                slo=rng.choice((5.0, 10.0, 20.0, 40.0)),
                zipf=rng.choice((0.0, 1.0)),
                segments=min(rng.choice((1, 1, 2, 3)), most_segments),
            )
        )
    return found


def place_of(own: Configuration) -> tuple[str, int, int]:
    """Those that can share a runtime stand together."""
    return f"{own.model} {own.fields}", own.segments, own.number
