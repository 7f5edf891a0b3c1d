"""Superkernels: one operation for many equal heavy ops. One file each, one signature.

    supports(op)            whether the kernel can run an op
    layout(op)              the layout in which it reads a row of right operands
    run(op, lhs, rhs)       lhs [G, R, *op.lhs.shape], rhs [G, *layout(op).of(op.rhs.shape)] -> [G, R, *op.out.shape]

A kernel of FUSING runs elementwise work on its result before it writes it, in tiles of a size that may be given:
run(..., epilogue=, operands=, blocks=).

G counts problems with distinct right operands (weights), R the lanes that share one. Lanes never mix: no kernel reduces
over G or R, and what a kernel pads it cuts away. `choose` picks by rule; what was measured (coalesce.tuning) goes
before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Protocol

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels import (
    batched_dot,
    batched_matvec,
    conv_grouped,
    conv_slices,
    conv_taps,
    indexed_gemm,
    indexed_matvec,
    mosaic_gemm,
    separate,
)
from coalesce.kernels.epilogue import Epilogue
from coalesce.layout import Layout


class Kernel(Protocol):
    def supports(self, op: HeavyOp, /) -> bool: ...
    def layout(self, op: HeavyOp, /) -> Layout: ...
    def run(self, op: HeavyOp, lhs: Any, rhs: Any, /) -> Any: ...


class FusingKernel(Kernel, Protocol):
    def run(
        self,
        op: HeavyOp,
        lhs: Any,
        rhs: Any,
        /,
        *,
        epilogue: Epilogue | None = None,
        operands: Sequence[Any] = (),
        blocks: Blocks | None = None,
    ) -> Any: ...


KERNELS: Mapping[str, Kernel] = {
    "batched_dot": batched_dot,
    "batched_matvec": batched_matvec,
    "conv_slices": conv_slices,
    "conv_grouped": conv_grouped,
    "conv_taps": conv_taps,
    "separate": separate,
    "indexed_gemm": indexed_gemm,
    "indexed_matvec": indexed_matvec,
    "mosaic_gemm": mosaic_gemm,
}

FUSING: Mapping[str, FusingKernel] = {
    "indexed_gemm": indexed_gemm,
    "indexed_matvec": indexed_matvec,
    "mosaic_gemm": mosaic_gemm,
}

# Of these, what may take a result's columns apart, leave several values, and read what a loop's step reads in place.
TAKES_APART = ("indexed_gemm", "indexed_matvec")

# What runs on some GPUs alone: only where it was measured, or a caller asks for it.
ON_HOPPER = ("mosaic_gemm",)

# Measurements of other versions are not used: raise it when they do not say any more which kernel is the fastest.
VERSION = 1

# On a CPU, slices win only while the patch matrix stays in cache (measured with 8 lanes, 8x8x16 to 56x56x64).
CPU_PATCH_BYTES = 256 * 1024
# With few rows they win for one problem too: 1.1 to 2.8 times at 9 to 49 rows of 2304 and 4608 (measured, 3x3 on
# 3x3x256 to 7x7x512), and 135 times at 2x2x512, where the library's convolution takes 24 ms.
CPU_FEW_ROWS = 49
# On a GPU they win everywhere measured; this only keeps the patches of all lanes from crowding out the weights.
GPU_PATCH_BYTES = 8 * 1024**3
# More taps of a depthwise window make a loop that XLA compiles for seconds, and that wins less: on a CPU 7x7 took a
# twentieth of the time of one by one, 11x11 half of it.
MOST_TAPS = 64


def choose(op: HeavyOp, groups: int, platform: str) -> str:
    """The kernel for `groups` problems of `op`, by rule.

    - Dots: batched_dot; with one row on a GPU batched_matvec (5 to 25% less kernel time on an H200, for one LSTM to 32,
      and it alone leaves the weights of a loop where they are; on a CPU it is up to twice as slow).
    - Depthwise convolutions: a sum over the window's taps, on a CPU too, where the library's are plain loops (5 to 80
      times as fast as one by one for most layers of a MobileNetV2 at 96 and 224 pixels, 1 to 8 lanes; slower for none).
    - Other grouped convolutions: one grouped convolution on a GPU; on a CPU one by one.
    - Other convolutions: slices and a batched dot on a GPU (faster than cuDNN at batch 1 even for one problem), and for
      few rows on a CPU; else one by one there, as Eigen's convolution beats a patch matrix that leaves the cache.
    - indexed_gemm, indexed_matvec and mosaic_gemm only where they were tuned and won, where a model of tiles speaks of
      the op (coalesce/tuning/estimate.py), or where a caller asks for them.
    """
    cpu = platform == "cpu"
    if op.kind == "dot":
        return "batched_matvec" if op.m == 1 and not cpu else "batched_dot"
    if not conv_slices.supports(op):
        return "separate"
    if conv_taps.supports(op) and prod(op.rhs.shape[:-2]) <= MOST_TAPS:
        return "conv_taps"
    if op.params["feature_group_count"] > 1:
        return "separate" if cpu else "conv_grouped"
    patch_bytes = op.m * op.k * op.lhs.dtype.itemsize
    if not cpu:
        return "conv_slices" if groups * patch_bytes <= GPU_PATCH_BYTES else "separate"
    small = op.m <= CPU_FEW_ROWS or (groups > 1 and patch_bytes <= CPU_PATCH_BYTES)
    return "conv_slices" if small else "separate"
