"""What is worth measuring for an op: kernels, and block sizes of those that are tiled, some tens in all.

Blocks are every power of two that the rules below leave, and of columns that TMA fetches 192 and in 32 bits 96: of 768
and 3072 columns 192 make 128 programs for 132 cores, where 256 make 96. The rules leave out what cannot run, what
computes mostly padding, what leaves most of the device idle, and what never came within 2% of the best for 16 ResNet-50
on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels import FUSING, indexed_gemm, indexed_matvec, KERNELS, mosaic_gemm
from coalesce.kernels.indexed_gemm import tile
from coalesce.kernels.mosaic import GROUP, ROW_BYTES, SHARED_BYTES as SHARED
from coalesce.kernels.mosaic_tile import Tile, tile_of, WIDEST
from coalesce.kernels.windows import FEW, windows_of

Candidate = tuple[str, Blocks | None]  # (kernel, its blocks if it is tiled)

SHARED_BYTES = 200 * 1024  # of 227 KiB that a program may have on an H100
STEP_BYTES = 256  # of a step's row
SEPARATE = 8  # problems on a GPU: more of them one by one are slow to compile, and slow
CORES = 132  # of an H100
STAGES = (12, 9, 6, 5, 4, 3, 2, 1)
FEWEST = 64  # programs of mosaic_gemm: larger tiles read less
TURNED = ((64, 4), (128, 4), (128, 8), (192, 12), (256, 8))  # columns and warps of its turned tiles, of which
PARTS = 3  # at most cover an image


def candidates(op: HeavyOp, width: int, rows: int, platform: str, on_hopper: bool = False) -> list[Candidate]:
    """For `width` problems of `op`, `rows` lanes on each; `on_hopper` for a GPU of that kind."""
    plain: list[Candidate] = [
        (name, None) for name in KERNELS if name not in FUSING and is_sensible(name, op, width, platform)
    ]
    plain = plain or [("separate", None)]
    if platform == "cpu" or not indexed_gemm.supports(op):  # on a CPU it is interpreted
        return plain
    rowwise = [("indexed_matvec", blocks) for blocks in strips(op, width)] if indexed_matvec.supports(op) else []
    by_tma = on_hopper and mosaic_gemm.supports(op)
    fetched = tma_tiles(op, width * rows) if by_tma else []
    return [
        *plain,
        *rowwise,
        *(("indexed_gemm", blocks) for blocks in tiles(op, width, rows)),
        *(("mosaic_gemm", blocks) for blocks in fetched),
    ]


def is_sensible(kernel: str, op: HeavyOp, width: int, platform: str) -> bool:
    if not KERNELS[kernel].supports(op):
        return False
    if kernel == "batched_matvec":
        return op.m == 1
    return kernel != "separate" or platform == "cpu" or width <= SEPARATE


def strips(op: HeavyOp, width: int) -> Iterator[Blocks]:
    """Columns and steps of K of indexed_matvec, whose weights of a step stay in registers."""
    for n, k, warps, stages in product((1, 2, 4, 8, 16, 32, 64), (128, 256, 512, 1024, 2048), (1, 2, 4, 8), (1, 3)):
        each = n * k // (32 * warps)  # elements of a thread
        idle = -(-op.n // n) * width * op.batch < 2 * CORES and n > 1
        if 8 <= each <= 64 and k <= tile(op.k) and n <= tile(op.n) and not idle and (stages == 1 or k < op.k):
            yield Blocks(1, n, k, warps, stages)


def tiles(op: HeavyOp, width: int, rows: int) -> Iterator[Blocks]:
    height, columns, itemsize = rows * op.m, op.n, op.lhs.dtype.itemsize
    channels = windows_of(op).channels
    depth = tile(channels if channels >= 32 else op.k)  # what one step can take in
    # Windows over few channels overlap within a load's line: one stage reads by way of the L1.
    stages_of = (1, 2, 3, 4) if op.kind == "conv" and channels <= FEW else (2, 3, 4)
    sizes = product((16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (16, 32, 64, 128), (4, 8), stages_of)
    for m, n, k, warps, stages in sizes:
        area, steps = m * n, -(-op.k // k)
        count = -(-height // m) * -(-columns // n) * width * op.batch
        wasteful = m > tile(height) or n > tile(columns) or k > max(32, depth)
        too_large = (
            (m + n) * k * itemsize * stages > SHARED_BYTES
            or k * itemsize > STEP_BYTES
            or (area > 64 * 32 and count < CORES // 2)  # most of the device would idle
            or (area > 128 * 128 and (count < 2 * CORES or op.k < 512))
            or area > 128 * 256
        )
        too_small = (
            (area < 64 * 32 and height > 32 and columns > 16)
            or (m == 16 and height > 128)
            or (n == 16 and columns > 32)
            or (k == 16 and channels >= 32)
        )
        badly_run = (
            (warps == 8 and area < 64 * 64)
            or (warps == 4 and area > 64 * 128)
            or (stages > 2 and stages > steps)  # nothing to fetch ahead
            or (stages == 2 and steps > 4)
        )
        if not (wasteful or too_large or too_small or badly_run):
            yield Blocks(m, n, k, warps, stages)


def tma_tiles(op: HeavyOp, lanes: int) -> Iterator[Blocks]:
    """Of mosaic_gemm, with as many stages as leave room on a core for three programs, two, or one."""
    images = lanes * (op.lhs.shape[0] if op.kind == "conv" else 1)
    row = ROW_BYTES // op.lhs.dtype.itemsize
    for one, k, over in product((*upright(), *turned(op)), (row, 2 * row), (False, True)):
        if over and not is_large(one, k, op):
            continue
        found: set[int] = set()
        for room in rooms(one, over):
            staged = (tile_of(op, replace(one, k=k, stages=stages, over=over)) for stages in STAGES)
            fitting = [each for each in staged if each and each.shared_bytes * room <= SHARED]
            most = next((each for each in fitting if each.right_stages == each.blocks.stages), None)
            if most and is_sensible_tile(most, images) and most.blocks.stages not in found:
                found.add(most.blocks.stages)
                yield most.blocks


def rooms(one: Blocks, over: bool) -> tuple[int, ...]:
    """How many programs may have room on a core. Of those that are large two of one warpgroup that multiplies have
    registers there, and of several one."""
    if over:
        return (2, 1) if one.warps == 4 else (1,)
    return (2, 1) if one.turned else (3, 2, 1)


def is_large(one: Blocks, k: int, op: HeavyOp) -> bool:
    """Whether a tile of the result takes as much memory as one and a half of a step: beside it there are few."""
    return 2 * one.m * one.n * op.out.dtype.itemsize >= 3 * (one.m + one.n) * k * op.lhs.dtype.itemsize


def upright() -> Iterator[Blocks]:
    for (m, warps), n in product(((64, 4), (128, 8), (256, 8), (256, 16)), (64, 96, 128, 192, 256)):
        yield Blocks(m, n, 0, warps)


def turned(op: HeavyOp) -> Iterator[Blocks]:
    """For images that tiles of 64 positions do not cover well: such as cover one in a few equal parts."""
    if op.m % GROUP == 0:
        return
    tall, wide = windows_of(op).out or (1, op.m)
    width = -(-wide // 8) * 8
    parts = range(1, PARTS + 1)
    covering = {-(-tall // n) * width if tall > 1 else -(-width // n // 8) * 8 for n in parts}
    for m, (n, warps) in product(sorted(m for m in covering if m <= WIDEST), TURNED):
        yield Blocks(m, n, 0, warps, turned=True)


def is_sensible_tile(one: Tile, images: int) -> bool:
    blocks = one.blocks
    programs = one.count * (one.op.n // blocks.n) * images
    padded = one.count * blocks.m / one.op.m
    deep = one.deep > 1 and one.steps < 4  # fewer waits for a loop that hardly has any
    return padded <= 1.5 and programs >= FEWEST and not deep
