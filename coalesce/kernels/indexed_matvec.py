"""Dots of one row as one Pallas kernel that reads each problem's weights where they lie, once, and no tensor core: a
product of a row and a matrix is as fast as the matrix can be read.

    grid (blocks of columns, problems)
    a program: for its columns, sum over blocks of K of weights [n, k] * row [k], then the epilogue

Lanes that share a right operand are further rows, each with its own sum. Slots, slabs and epilogues as in indexed_gemm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels import as_product, indexed_gemm
from coalesce.kernels.epilogue import Epilogue, WHOLE
from coalesce.kernels.tiles import along, below, down, Source
from coalesce.kernels.triton import both, launch, load, store
from coalesce.layout import AS_IS, Layout


def supports(op: HeavyOp) -> bool:
    return op.kind == "dot" and op.m == 1 and indexed_gemm.supports(op)


def layout(op: HeavyOp) -> Layout:
    """[B.., K.., N..] -> [N, K], or [B, N, K] with batch dimensions."""
    batched = AS_IS.reshape((op.batch, op.k, op.n)).transpose((0, 2, 1))
    return batched if op.batch > 1 else AS_IS.reshape((op.k, op.n)).transpose((1, 0))


def run(
    op: HeavyOp,
    lhs: Any,
    rhs: Any,
    epilogue: Epilogue | None = None,
    operands: Sequence[Any] = (),
    blocks: Blocks | None = None,
) -> Any:
    """lhs [G,R,*lhs] x rhs [G,*layout] -> [G,R,*out]; what may be picked or cut, as in indexed_gemm."""
    groups, per_group = lhs.shape[:2]
    problems, blocks = groups * op.batch, blocks or blocks_for(op)
    reads = indexed_gemm.by_problem(op, rhs, epilogue, operands)
    kinds, first = epilogue.kinds if epilogue else (), len(reads.slots)

    def kernel(*refs: Any) -> None:
        block, problem = pl.program_id(0), pl.program_id(1)
        weights, *rest = reads.sources(refs[first + 1 : -1], refs[:first], problem)
        n = block * blocks.n + jnp.arange(blocks.n, dtype=jnp.int32)
        mask = below(n, op.n, blocks.n)
        sums = products(op, blocks, problem, refs[first], weights, n, mask, per_group)
        for lane, total in enumerate(sums):
            y = jnp.sum(total, axis=1)[None, :].astype(op.out.dtype)
            if epilogue:
                y = epilogue.apply(y, *(vector(s, k, lane, n, mask) for s, k in zip(rest, kinds, strict=True)))
            store(refs[-1], (problem, jnp.full((1, 1), lane, jnp.int32), n[None, :]), y, along(mask))

    def vector(source: Source, kind: str, lane: int, n: Any, mask: Any) -> Any:
        by_lane = kind == WHOLE or per_group > 1
        place = (jnp.full((1, 1), lane, jnp.int32), n[None, :]) if by_lane else (n[None, :],)
        return source.load(place, op.n, along(mask))

    dtype = epilogue.dtype if epilogue else op.out.dtype
    (y,) = launch(
        kernel,
        (pl.cdiv(op.n, blocks.n), problems),
        [jax.ShapeDtypeStruct((problems, per_group, op.n), dtype)],
        [*reads.slots, as_product.left(op, lhs), *reads.arrays],
        name=f"matvec_{problems}x{per_group}x{op.n}x{op.k}",
        warps=blocks.warps,
        stages=blocks.stages,
    )
    return as_product.result(op, y, groups, per_group)


def products(
    op: HeavyOp, blocks: Blocks, problem: Any, x: Any, w: Source, n: Any, mask: Any, lanes: int
) -> tuple[jax.Array, ...]:
    """For each lane [n, k] in float32, whose sum over k is its result: sums along K come last, once."""
    ranged = jnp.arange(blocks.k, dtype=jnp.int32)

    def step(i: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        k = i * blocks.k + ranged
        fits = below(k, op.k, blocks.k)
        weights = w.load((n[:, None], k[None, :]), op.k, both(down(mask), along(fits))).astype(jnp.float32)
        rows = [load(x, (problem, jnp.full_like(k, lane), k), fits).astype(jnp.float32) for lane in range(lanes)]
        return tuple(total + weights * row[None, :] for total, row in zip(totals, rows, strict=True))

    zeros = tuple(jnp.zeros((blocks.n, blocks.k), jnp.float32) for _ in range(lanes))
    return lax.fori_loop(0, pl.cdiv(op.k, blocks.k), step, zeros)


def blocks_for(op: HeavyOp) -> Blocks:
    """By rule, until tuned: whole rows of weights where they are short, and few of them, since a step's weights stay in
    registers."""
    k = min(512, indexed_gemm.tile(op.k))
    return Blocks(1, min(8192 // k, indexed_gemm.tile(op.n)), k, stages=2)
