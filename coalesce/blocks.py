"""The sizes in which a tiled kernel works: what a tuner varies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """The tile of a program, [m, n] of the result in steps of k. Powers of two, of 16 at least for tensor cores.

    mosaic_gemm may have 96 or 192 columns, and any multiple of 8 rows where it is `turned`. Where its result lies
    `over` what was multiplied there is room for more of that. See kernels/mosaic_share.py and mosaic_tile.py.
    """

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3
    turned: bool = False
    over: bool = False

    def __str__(self) -> str:
        how = " turned" * self.turned + " over" * self.over
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages}{how}"
