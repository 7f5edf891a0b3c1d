"""Microseconds of the arithmetic of one batched matrix product: wave quantisation, over the tiles a library may use.

The result is computed in tiles, one a core at a time. A wave is as many tiles as there are cores, and the last one
takes as long as a full one. With few tiles the contraction is cut into parts, more tiles, whose results one more kernel
adds. The library, or XLA's autotuner, takes the fastest way: so does the model. Each way takes longer with every
dimension, hence so does the fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from coalesce.costs.devices import Device

ROUNDING = 1e-9
IDLE = 2  # the contraction is cut only while the parts of one product leave half of the cores idle


Product = tuple[float, int, int, int, int]  # rate, batch, m, n, k


def product_us(device: Device, rate: float, batch: int, m: int, n: int, k: int) -> float:
    """`batch` products [m,k] x [k,n] at `rate` FLOPs a microsecond, were all operands at hand."""
    return fastest(device, rate, batch, m, n, k)[0]


def tiles_of(device: Device, rate: float, batch: int, m: int, n: int, k: int) -> int:
    """How many tiles that takes."""
    return fastest(device, rate, batch, m, n, k)[1]


def fastest(device: Device, rate: float, batch: int, m: int, n: int, k: int) -> tuple[float, int]:
    """(microseconds, tiles) of the fastest way."""
    per_core = rate / device.cores
    best = float("inf"), 0
    for tile in device.tiles:
        tiles = -(-m // tile.m) * -(-n // tile.n)
        step_us = 2 * tile.m * tile.n * device.k_step / (per_core * tile.efficiency)
        for parts in device.splits:
            if parts > 1 and tiles * parts * IDLE > device.cores:
                break
            waves = -(-batch * tiles * parts // device.cores)
            us = waves * -(-k // (parts * device.k_step)) * step_us
            if parts > 1:  # float32 parts, written and read
                us += device.launch_us + 8 * parts * batch * m * n / (device.memory_gbs * 1e3)
            best = min(best, (us, batch * tiles * parts))
    return best


def together_us(device: Device, products: Sequence[Product]) -> float:
    """Products of different shapes in one kernel, which cuts no contraction. Tiles that take longest come first, and
    each next one runs on the first core that is free: so all of those so far take whole rounds of the shortest, and no
    more than each product after those before it."""
    best = float("inf")
    for tile in device.tiles:
        parts: list[tuple[float, int]] = []  # microseconds of a tile, and how many of them
        for rate, batch, m, n, k in products:
            step_us = 2 * tile.m * tile.n * device.k_step * device.cores / (rate * tile.efficiency)
            parts.append((-(-k // device.k_step) * step_us, batch * -(-m // tile.m) * -(-n // tile.n)))
        us = work = 0.0
        for tile_us, tiles in sorted(parts, reverse=True):
            work += tile_us * tiles / device.cores
            rounds, own = ceil(work / tile_us - ROUNDING), -(-tiles // device.cores)
            us = max(us, min(rounds * tile_us, us + own * tile_us))
        best = min(best, us)
    return best
