"""The sizes in which a tiled kernel works: what a tuner varies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """The tile of a program, [m, n] of the result in steps of k. Powers of two, of 16 at least for tensor cores.

    mosaic_gemm may have 192 columns, and any multiple of 8 rows where it is `turned`: see kernels/mosaic_share.py.
    """

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3
    turned: bool = False

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages}{' turned' if self.turned else ''}"
