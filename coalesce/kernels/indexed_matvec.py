"""Dots of one row as one Pallas kernel that reads each problem's weights where they lie, once, and no tensor core: a
product of a row and a matrix is as fast as the matrix can be read.

    grid (blocks of columns, problems)
    a program: for its columns, sum over blocks of K of weights [n, k] * row [k], then the epilogue

Where the epilogue takes the columns apart, as a recurrent cell does its gates, a program has a block of each strip, and
leaves what the cell does. Lanes that share a right operand are further rows, each with its own sum. Slots, slabs and
epilogues as in indexed_gemm.
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
from coalesce.kernels.epilogue import End, Epilogue, NONE, WHOLE
from coalesce.kernels.operands import Source
from coalesce.kernels.tiles import along, below, down, share
from coalesce.kernels.triton import both, launch, load, store
from coalesce.kernels.windows import power
from coalesce.layout import AS_IS, Layout

STRIP = 8  # columns of each strip of a block, by rule


def supports(op: HeavyOp) -> bool:
    return op.kind == "dot" and op.m == 1 and indexed_gemm.supports(op)


def layout(op: HeavyOp) -> Layout:
    """[B.., K.., N..] -> [N, K], or [B, N, K] with batch dimensions."""
    if op.batch > 1:
        return AS_IS.reshape((op.batch, op.k, op.n)).transpose((0, 2, 1))
    flat = AS_IS if op.rhs.shape == (op.k, op.n) else AS_IS.reshape((op.k, op.n))
    return flat.transpose((1, 0))


def run(
    op: HeavyOp,
    lhs: Any,
    rhs: Any,
    epilogue: Epilogue | None = None,
    operands: Sequence[Any] = (),
    blocks: Blocks | None = None,
) -> Any:
    """lhs [G,R,*lhs] x rhs [G,*layout] -> [G,R,*out], or what the epilogue leaves; what may be picked or cut, as in
    indexed_gemm."""
    groups, per_group = lhs.shape[:2]
    problems, work = groups * op.batch, epilogue or NONE
    blocks = blocks or blocks_for(op, work.parts)
    reads = indexed_gemm.by_problem(op, rhs, epilogue, operands)
    first, count, left = len(reads.scalars), len(work.left), epilogue.left if epilogue else (End(op.out.dtype),)
    strip, columns = op.n // work.parts, share(blocks.n, work.parts)
    x = as_product.left(op, lhs)  # of one lane as its vectors are, which may be the same zeros
    x = x.reshape(problems, op.k) if per_group == 1 else x

    def kernel(*refs: Any) -> None:
        block, problem = pl.program_id(0), pl.program_id(1)
        weights, *rest = reads.sources(refs[first + 1 : -count], refs[:first], problem)
        n = block * columns + jnp.arange(columns, dtype=jnp.int32)
        mask = below(n, strip, columns)
        given = [operands_of_lane(rest, lane, n, mask) for lane in range(per_group)]  # on their way meanwhile
        strips = [n + p * strip if p else n for p in range(work.parts)]
        sums = products(op, blocks.k, problem, refs[first], weights, strips, mask, per_group)
        for lane, totals in enumerate(sums):
            tiles = [jnp.sum(total, axis=1)[None, :].astype(op.out.dtype) for total in totals]
            at = jnp.full((1, 1), lane, jnp.int32)
            for y, results in zip(refs[-count:], work.results(tiles, given[lane]), strict=True):
                for i, result in enumerate(results):
                    store(y, (problem, at, n[None, :] + i * strip), result, along(mask))

    def operands_of_lane(sources: Sequence[Source], lane: int, n: Any, mask: Any) -> list[list[Any]]:
        found: list[list[Any]] = []
        for i, (source, kind) in enumerate(zip(sources, work.kinds, strict=True)):
            by_lane = kind == WHOLE or per_group > 1
            row, strips = (jnp.full((1, 1), lane, jnp.int32),) if by_lane else (), work.strips_of(i)
            places = [(*row, n[None, :] + s * strip) for s in range(strips)]
            found.append([source.load(place, strips * strip, along(mask)) for place in places])
        return found

    ys = launch(
        kernel,
        (pl.cdiv(strip, columns), problems),
        [jax.ShapeDtypeStruct((problems, per_group, end.strips * strip), end.dtype) for end in left],
        [*reads.scalars, x, *reads.arrays],
        name=f"matvec_{problems}x{per_group}x{op.n}x{op.k}",
        warps=blocks.warps,
        stages=blocks.stages,
    )
    results = [as_product.result(op, y, groups, per_group) for y in ys]
    return results[0] if work.plain else results


def products(
    op: HeavyOp, block: int, problem: Any, x: Any, w: Source, strips: Sequence[Any], mask: Any, lanes: int
) -> tuple[tuple[jax.Array, ...], ...]:
    """For each lane, and the columns n of each strip, [n, k] in float32, whose sum over k is its result: sums along K
    come last, once."""
    ranged = jnp.arange(block, dtype=jnp.int32)

    def step(i: Any, totals: tuple[tuple[jax.Array, ...], ...]) -> tuple[tuple[jax.Array, ...], ...]:
        k = i * block + ranged
        fits = below(k, op.k, block)
        inside = both(down(mask), along(fits))
        weights = [w.load((n[:, None], k[None, :]), op.k, inside).astype(jnp.float32) for n in strips]
        each = [(jnp.full_like(k, lane),) if lanes > 1 else () for lane in range(lanes)]
        rows = [load(x, (problem, *lane, k), fits).astype(jnp.float32) for lane in each]
        return tuple(
            tuple(total + each * row[None, :] for total, each in zip(own, weights, strict=True))
            for own, row in zip(totals, rows, strict=True)
        )

    zeros = tuple(tuple(jnp.zeros((len(n), block), jnp.float32) for n in strips) for _ in range(lanes))
    return lax.fori_loop(0, pl.cdiv(op.k, block), step, zeros)


def blocks_for(op: HeavyOp, parts: int = 1) -> Blocks:
    """By rule, until tuned: whole rows of weights where they are short, and few of them, since a step's weights stay in
    registers. Of several strips these would be too many for a core to have all its programs at once: rows come piece by
    piece, some ahead (a step of 8 LSTMs of 512 units, float32: 6.0 us on an H200 instead of 8.8)."""
    if parts > 1:
        return Blocks(1, STRIP * power(parts), min(128, indexed_gemm.tile(op.k)), stages=3)
    k = min(512, indexed_gemm.tile(op.k))
    return Blocks(1, min(8192 // k, indexed_gemm.tile(op.n)), k, stages=2)
