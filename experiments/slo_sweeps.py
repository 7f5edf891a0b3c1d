"""What slo_attainment simulates: sweeps of one parameter after the other, and where each policy leaves the 99% line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from experiments.results import Row
from experiments.simulated import highest, row_of, Setting

LINE = 0.99
WITHIN = 0.03  # of the rate that is looked for
SERVED = 0.6  # of the bound: the load of the sweeps of other things than rate
SERVED_UNEVENLY = 0.3  # where runs take what they do by chance

LOADS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
SWEEPS: dict[str, Sequence[Any]] = {
    "rate": LOADS,
    "cv": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    "slo_scale": (1.5, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 20.0),
    "tenants": (1, 2, 4, 8, 16, 32, 64, 128),
    "families": (1, 2, 4, 8, 16),
    "spread": (1.0, 1.05, 1.2, 1.5, 2.0, 3.0, 5.0),
}
SEARCHES = (
    *({"tenants": tenants, "slo_scale": scale} for tenants in (4, 16, 64) for scale in (2.0, 3.0, 5.0, 10.0)),
    {"cv": 2.0},
    {"cv": 4.0},
    {"families": 4},
    {"families": 16},
)

Cell = tuple[str, str, Any]  # sweep or "search", policy, which setting


def setting_of(sweep: str, value: Any) -> Setting:
    """With one parameter changed; the rates of sweeps are shares of the usual setting's bound."""
    usual = Setting()
    if sweep == "rate":
        return replace(usual, rate=value * usual.bound)
    return replace(usual, rate=load_of(sweep) * usual.bound, **{sweep: value})


def load_of(sweep: str) -> float:
    return SERVED_UNEVENLY if sweep == "spread" else SERVED


def cells(policies: Sequence[str]) -> list[Cell]:
    swept = [(sweep, name, value) for sweep, values in SWEEPS.items() for value in values for name in policies]
    return [*swept, *(("search", name, i) for i in range(len(SEARCHES)) for name in policies)]


def measure(cell: Cell, requests: int, seed: int) -> Row:
    kind, name, value = cell
    if kind == "search":
        setting = replace(Setting(), **SEARCHES[value])
        return {"sweep": kind, "value": value, **search(name, setting, requests // 2, seed)}
    return {"sweep": kind, "value": value, **row_of(name, setting_of(kind, value), requests, seed)}


def search(name: str, setting: Setting, requests: int, seed: int) -> Row:
    """The rate at which 99% of the requests are in time."""

    def good(rate: float) -> bool:
        return row_of(name, replace(setting, rate=rate), requests, seed)["attainment"] >= LINE

    rate = highest(good, 0.005 * setting.bound, 1.1 * setting.bound, WITHIN)
    bounds = {"bound": setting.bound, "fused_load": setting.fused_load, "unfused_load": setting.unfused_load}
    return {"policy": name, **asdict(replace(setting, rate=rate)), "seed": seed, **bounds}


def cell_of(row: Row) -> Cell:
    return row["sweep"], row["policy"], row["value"]
