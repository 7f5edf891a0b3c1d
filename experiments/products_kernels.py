"""Kernels that run n equal products inside a program: ours, indexed_gemm with several tiles, and cuBLAS batched."""

from __future__ import annotations

from functools import partial

import jax

from coalesce.blocks import Blocks
from coalesce.kernels import batched_dot, indexed_gemm, KERNELS
from coalesce.measuring.in_program import Work
from coalesce.tuning import candidate_name
from experiments.cost_cases import run_kernel
from experiments.kernel_clock import Contender
from experiments.products import Products

CUBLAS = "cublas_batched"
MATRIX_TILES = (  # m, n, k, warps, stages
    Blocks(64, 64, 32),
    Blocks(64, 64, 64),
    Blocks(128, 64, 32),
    Blocks(128, 64, 64, 8),
    Blocks(64, 64, 64, 8, 2),
)
ROW_TILES = (Blocks(16, 32, 128), Blocks(16, 64, 128), Blocks(16, 128, 64), Blocks(16, 32, 256, 4, 2))


TILES = {candidate_name("indexed_gemm", blocks): blocks for blocks in (*MATRIX_TILES, *ROW_TILES)}
NAMES = (*KERNELS, *TILES, CUBLAS)


def names(products: Products) -> list[str]:
    """Those that run these products on this device, except that Pallas kernels may be interpreted: see `pallas`."""
    op = products.op
    tiles = ROW_TILES if products.m == 1 else MATRIX_TILES
    library = [CUBLAS] if jax.default_backend() == "gpu" else []
    own = [name for name, kernel in KERNELS.items() if kernel.supports(op)]
    return [
        *own,
        *([candidate_name("indexed_gemm", blocks) for blocks in tiles] if indexed_gemm.supports(op) else ()),
        *library,
    ]


def pallas(name: str) -> bool:
    return name.startswith("indexed_gemm")


def contender(products: Products, name: str) -> Contender:
    op = products.op
    kernel = indexed_gemm if name in TILES else batched_dot if name == CUBLAS else KERNELS[name]
    run = partial(indexed_gemm.run, blocks=TILES[name]) if name in TILES else kernel.run
    left = jax.ShapeDtypeStruct((products.count, 1, *op.lhs.shape), op.lhs.dtype)
    right = jax.ShapeDtypeStruct((products.count, *kernel.layout(op).of(op.rhs.shape)), op.rhs.dtype)
    work = Work(partial(run_kernel, run, op), left, (right,))
    if name == CUBLAS:  # XLA finds out which of its kernels
        return Contender(work, {"xla_gpu_enable_triton_gemm": False}, library="cublas")
    return Contender(work)
