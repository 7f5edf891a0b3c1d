"""A device as the kernels of a program see it: microseconds of a stream of bytes and of a matrix product.

    us = launch + the longer of arithmetic and traffic + what of the shorter does not hide behind it

Weights are read from memory, once in a program; what one kernel hands to the next may be in a cache still.
"""

from __future__ import annotations

from collections.abc import Sequence

from coalesce.costs.devices import Device
from coalesce.costs.product import Product, product_us, together_us


class Machine:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.products: dict[tuple[float, int, int, int, int], float] = {}

    def traffic(self, weights: int, moved: int) -> float:
        """Bytes of weights, and bytes that kernels hand on, read and written."""
        device = self.device
        cached = min(moved, device.cache_bytes)
        return (weights + moved - cached) / (device.memory_gbs * 1e3) + cached / (device.cache_gbs * 1e3)

    def stream(self, weights: int, moved: int) -> float:
        """One kernel with next to no arithmetic."""
        return self.device.launch_us + self.traffic(weights, moved)

    def copy(self, nbytes: int) -> float:
        """One kernel that moves so many bytes elsewhere."""
        return self.stream(0, 2 * nbytes)

    def product(self, rate: float, batch: int, m: int, n: int, k: int, weights: int, moved: int) -> float:
        """One kernel: `batch` products [m,k] x [k,n] at `rate` FLOPs a microsecond."""
        key = (rate, batch, m, n, k)
        if (arithmetic := self.products.get(key)) is None:
            arithmetic = self.products[key] = product_us(self.device, rate, batch, m, n, k)
        return self.kernel(arithmetic, weights, moved)

    def together(self, products: Sequence[Product], weights: int, moved: int) -> float:
        """One kernel for products of different shapes."""
        return self.kernel(together_us(self.device, products), weights, moved)

    def kernel(self, arithmetic: float, weights: int, moved: int) -> float:
        shorter, longer = sorted((arithmetic, self.traffic(weights, moved)))
        return self.device.launch_us + longer + (1 - self.device.overlap) * shorter
