"""Microseconds of the arithmetic of one batched matrix product: wave quantisation, over the tiles a library may use.

The result is computed in tiles, one a core at a time. A wave is as many tiles as there are cores, and the last one
takes as long as a full one. With few tiles the contraction is cut into parts, more tiles, whose results one more kernel
adds. The library, or XLA's autotuner, takes the fastest way: so does the model. Each way takes longer with every
dimension, hence so does the fastest.
"""

from __future__ import annotations

from coalesce.costs.devices import Device

IDLE = 2  # the contraction is cut only while the parts of one product leave half of the cores idle


def product_us(device: Device, rate: float, batch: int, m: int, n: int, k: int) -> float:
    """`batch` products [m,k] x [k,n] at `rate` FLOPs a microsecond, were all operands at hand."""
    per_core = rate / device.cores
    best = float("inf")
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
            best = min(best, us)
    return best
