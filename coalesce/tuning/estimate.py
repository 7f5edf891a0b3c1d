"""Blocks of indexed_gemm where nothing was measured: by a model of its tiles, fitted to what was.

A step of a tile takes its products, its operands' way from the L2, and a fetch's latency, shared by the fetches under
way; mostly as long as the longest of them. As many programs share a core as its shared memory and registers hold, and
take turns at the first two; programs come in waves. A product is never faster than memory brings its operands and
takes its result.

`python -m experiments.tile_model` fits it to the entries that Coalesce brings along, and says how good its blocks are
for an op that was left out of the fit: 7% slower than the best in 16 bits and 6% in float32. It speaks of convolutions,
and of products of many rows: with fewer, cuBLAS is as fast in float32, and in bfloat16 rounds of 8 BERTs of 128 rows,
one after the other, took 10% longer by these blocks than by cuBLAS, of 8 ViTs of 197 rows 18%, of 8 VGGs 43% less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels import indexed_gemm
from coalesce.kernels.tiles import Tiled
from coalesce.tuning.candidates import CORES, tiles

CORE_SHARED_BYTES = 227e3
PROGRAM_BYTES = 1024  # of shared memory, beside its operands
CORE_REGISTERS = 65536
CORE_WARPS = 64
CORE_PROGRAMS = 16
OTHER_REGISTERS = 40  # of a thread, beside its part of the tile
MOST_REGISTERS = 255
KERNEL = "indexed_gemm"  # whose blocks these are
SHARP = 4  # how near a sum of powers comes to the largest


@dataclass(frozen=True)
class Fit:
    """Microseconds and bytes: of a core, but for `memory`."""

    launch: float  # us
    flops: float  # a us
    l2: float  # bytes a us
    latency: float  # us until a fetch is there
    memory: float  # bytes a us, of the device
    write: float  # us a byte of the result, with what is read beside it
    program: float  # us of each
    warp: float  # us of each warp of a program


@dataclass(frozen=True)
class Range:
    """What a fit speaks of: ops of as many rows as those that it was fitted to, and blocks like their best. In float32
    these had 32 channels or more, and its blocks win with fewer too: kernels of 8 MobileNetV2 took 440 instead of 484
    us on an H200, and those of 8 VGG-16 2,853 instead of 2,907."""

    rows: Mapping[str, int]  # of a problem, at least; by kind of op
    steps: tuple[int, ...]  # blocks' k
    stages: int  # at most


LARGEST = 128  # rows or columns of a block: larger ones spill
RANGES = {  # by bytes of an element
    2: Range({"conv": 32, "dot": 512}, (32, 64, 128), 4),
    4: Range({"conv": 512, "dot": 512}, (32,), 3),
}

# The H100 is the same chip with slower memory, which changes the times and hardly the order.
H200 = {
    2: Fit(0.548, 4.08e6, 8.35e4, 0.844, 3.76e6, 2.57e-5, 0.919, 0.0459),
    4: Fit(0.05, 1.28e6, 8.35e4, 0.05, 3.76e6, 5.55e-5, 0.05, 0.0283),
}
FITS: Mapping[str, Mapping[int, Fit]] = {"NVIDIA H200": H200, "NVIDIA H100 80GB HBM3": H200}


def best_blocks(op: HeavyOp, width: int, rows: int, device: str) -> Blocks | None:
    """The blocks that should be fastest for `width` problems with `rows` lanes on each; None where it cannot say."""
    fits = FITS.get(device)
    if fits is None or not speaks_of(op, rows):
        return None
    fit = fits[op.lhs.dtype.itemsize]
    return min(blocks_of(op, width, rows), key=lambda blocks: us(fit, op, width, rows, blocks), default=None)


def speaks_of(op: HeavyOp, rows: int) -> bool:
    if op.batch > 1 or not indexed_gemm.supports(op):
        return False
    itemsize = op.lhs.dtype.itemsize
    precision = op.precision[0] if isinstance(op.precision, tuple) else op.precision
    exact = itemsize == 4 and precision is not None and precision.name != "DEFAULT"
    within = RANGES[itemsize]
    return not exact and rows * op.m >= within.rows[op.kind]


def blocks_of(op: HeavyOp, width: int, rows: int) -> list[Blocks]:
    within = RANGES[op.lhs.dtype.itemsize]
    return [
        b
        for b in tiles(op, width, rows)
        if max(b.m, b.n) <= LARGEST and b.k in within.steps and 1 < b.stages <= within.stages
    ]


def us(fit: Fit, op: HeavyOp, width: int, rows: int, blocks: Blocks) -> float:
    """Microseconds of a launch of `width` problems."""
    tiled, itemsize = Tiled(op, rows, blocks), op.lhs.dtype.itemsize
    area, count, steps = blocks.m * blocks.n, width * tiled.count, tiled.steps
    fetched = (blocks.m + blocks.n) * blocks.k * itemsize
    held = on_a_core(area, blocks.warps, fetched * min(blocks.stages, steps))
    together = min(held, -(-count // CORES))
    waves = -(-count // (CORES * together))
    under_way = max(1, min(blocks.stages - 1, steps))
    parts = together * 2 * area * blocks.k / fit.flops, together * fetched / fit.l2, fit.latency / under_way
    program = fit.program + fit.warp * blocks.warps + together * area * itemsize * fit.write
    working = waves * (steps * most(parts) + program)
    moved = width * (rows * prod(op.lhs.shape) + tiled.windows.k * op.n + rows * op.m * op.n) * itemsize
    return fit.launch + most((working, moved / fit.memory))


def most(times: tuple[float, ...]) -> float:
    """About the longest, and a little more where others are as long."""
    return sum(time**SHARP for time in times) ** (1 / SHARP)


def on_a_core(area: int, warps: int, shared: int) -> int:
    """How many programs run on a core at once."""
    registers = min(MOST_REGISTERS, area // (32 * warps) + OTHER_REGISTERS)
    fit = (
        CORE_SHARED_BYTES // (shared + PROGRAM_BYTES),
        CORE_WARPS // warps,
        CORE_REGISTERS // (registers * 32 * warps),
        CORE_PROGRAMS,
    )
    return max(1, int(min(fit)))
