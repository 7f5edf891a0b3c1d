"""Products that follow one another in one launch: what one computes the next one reads tile by tile, where it is.

    feed     [rows, J] x [J, N]    computes an operand of the next one's epilogue: a shortcut, never written
    wide     [rows, K] x [K, N]    and its epilogue; written unless the narrow product alone reads it
    narrow   [rows, N] x [N, n]    multiplies the wide one's tile as it comes, and sums over its columns

There is a feed, a narrow product or both. A program has some rows of a problem, and one tile of their columns, or with
a narrow product all of them one after the other: its sums are as wide as its result. Blocks are the wide product's: m
rows by n columns, and steps of k for whatever is summed over more than a tile holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels import indexed_gemm
from coalesce.kernels.epilogue import Epilogue
from coalesce.kernels.indexed_gemm import by_problem, positions, tile
from coalesce.kernels.tiles import along, down, Operands, Tiled
from coalesce.kernels.triton import both, div, dot, launch, load, rem, store

KERNEL = "indexed_gemm"  # whose weights these are
WIDEST = 256  # sums of a row
AT_ONCE = 128  # of K that a program keeps for all columns


@dataclass(frozen=True, eq=False)
class Link:
    """A product as `indexed_gemm.run` takes it. Of its left operand and of what its epilogue reads, one may be None:
    what the link before it computes."""

    op: HeavyOp
    lhs: Any
    rhs: Any
    epilogue: Epilogue | None
    operands: Sequence[Any]
    written: bool = True


def supports(feed: HeavyOp | None, wide: HeavyOp, narrow: HeavyOp | None) -> bool:
    """Operands of 16 bits: wider ones lie by columns, and their tiles would have to be turned."""
    every = [op for op in (feed, wide, narrow) if op]
    if not all(indexed_gemm.supports(op) and op.batch == 1 and op.lhs.dtype.itemsize == 2 for op in every):
        return False
    if feed and feed.out.shape != wide.out.shape:
        return False
    return narrow is None or multiplies(wide, narrow)


def multiplies(wide: HeavyOp, narrow: HeavyOp) -> bool:
    """Whether the narrow product is one of the wide one's rows, as they are."""
    if narrow.kind != "dot" or narrow.lhs.shape != wide.out.shape or narrow.k != wide.n or narrow.n > WIDEST:
        return False
    ((contracted, _), _) = narrow.params["dimension_numbers"]
    return contracted == (len(narrow.lhs.shape) - 1,) and len(narrow.rhs.shape) == 2


def run(links: Sequence[Link], blocks: Blocks) -> list[Any]:
    """Of each link its result [G,R,*out], or None if it is not written."""
    chain = chain_of(links, blocks)
    outs = [part.tiled.out(chain.problems) for part, link in zip(chain.parts, links, strict=True) if link.written]

    def kernel(*refs: Any) -> None:
        count = len(refs) - len(outs)
        results = iter(refs[count:])
        written = [next(results) if link.written else None for link in links]
        chain.write(pl.program_id(0), pl.program_id(1), refs[:count], written)

    ys = iter(
        launch(
            kernel,
            (chain.count, chain.problems),
            outs,
            chain.args,
            name=chain.name,
            warps=blocks.warps,
            stages=blocks.stages,
        )
    )
    lanes = links[0].lhs.shape[:2]
    return [next(ys).reshape(*lanes, *link.op.out.shape) if link.written else None for link in links]


@dataclass(frozen=True, eq=False)
class Part:
    """A link as the kernel has it: where it reads, and which of the epilogue's operands is the tile of the one before."""

    tiled: Tiled
    left: Any  # [P, positions, C]; None: that tile
    operands: Operands
    inner: int | None

    @property
    def args(self) -> tuple[Any, ...]:
        left = () if self.left is None else (self.left,)
        return (*self.operands.slots, *left, *self.operands.arrays)

    def sources(self, refs: Sequence[Any], problem: Any) -> tuple[Any, Any, list[Any]]:
        """The left operand, the weights, and what the epilogue reads, from references to `args`."""
        slots = len(self.operands.slots)
        first = slots + (self.left is not None)
        weights, *given = self.operands.sources(refs[first:], refs[:slots], problem)
        return (None if self.left is None else refs[slots]), weights, given

    def finished(self, total: Any, given: Sequence[Any], m: Any, n: Any, before: Any) -> Any:
        given = list(given)
        if self.inner is not None:
            given.insert(self.inner, before)
        return self.tiled.finished(total, given, m, n)

    def result(self, refs: Sequence[Any], problem: Any, m: Any, n: Any, before: Any, left: Any = None) -> Any:
        """A tile, after its epilogue. `left` is what it has of all of K, if that is there already."""
        x, w, given = self.sources(refs, problem)
        op, (rows, columns) = self.tiled.op, self.tiled.masks(m, n)
        if left is None:
            total = self.tiled.product(problem, x, w, m, n, rows, columns)
        else:
            k = jnp.arange(op.k, dtype=jnp.int32)
            total = dot(left, w.load((k[:, None], n[None, :]), op.n, along(columns)), None)
        return self.finished(total, given, m, n, before)


@dataclass(frozen=True, eq=False)
class Chain:
    parts: tuple[Part, ...]
    wide: int  # which of them
    problems: int

    @property
    def args(self) -> tuple[Any, ...]:
        return tuple(arg for part in self.parts for arg in part.args)

    @property
    def narrow(self) -> Part | None:
        return self.parts[self.wide + 1] if self.wide + 1 < len(self.parts) else None

    @property
    def count(self) -> int:
        """Programs of a problem."""
        tiled = self.parts[self.wide].tiled
        return tiled.count // tiled.across if self.narrow else tiled.count

    @property
    def name(self) -> str:
        first, *others = [part.tiled.op for part in self.parts]
        sizes = "_".join(f"{op.n}x{op.k}" for op in (first, *others))
        return f"chain_{self.problems}x{self.parts[0].tiled.rows}x{sizes}"

    def write(self, program: Any, problem: Any, refs: Sequence[Any], outs: Sequence[Any]) -> None:
        ends = list(accumulate((len(part.args) for part in self.parts), initial=0))
        own = [refs[start:end] for start, end in zip(ends, ends[1:], strict=False)]
        part = self.parts[self.wide]
        tiled, blocks = part.tiled, part.tiled.blocks
        across = 1 if self.narrow else tiled.across
        m = div(program, across) * blocks.m + jnp.arange(blocks.m, dtype=jnp.int32)
        rows = tiled.masks(m, m)[0]
        left = self.whole_rows(own[self.wide], problem, m) if self.narrow else None

        def tile_of(column: Any) -> Any:
            n = column * blocks.n + jnp.arange(blocks.n, dtype=jnp.int32)
            before = self.parts[0].result(own[0], problem, m, n, None) if self.wide else None
            found = part.result(own[self.wide], problem, m, n, before, left)
            if outs[self.wide] is not None:
                mask = both(down(rows), along(tiled.masks(m, n)[1]))
                store(outs[self.wide], (problem, m[:, None], n[None, :]), found, mask)
            return found, n

        if self.narrow is None:
            tile_of(rem(program, across))
            return
        _, w, given = self.narrow.sources(own[-1], problem)
        op = self.narrow.tiled.op
        q = jnp.arange(self.narrow.tiled.blocks.n, dtype=jnp.int32)
        columns = along(self.narrow.tiled.masks(m, q)[1])

        def step(column: Any, total: Any) -> Any:
            found, n = tile_of(column)
            return total + dot(found, w.load((n[:, None], q[None, :]), op.n, columns), None)

        total = lax.fori_loop(0, tiled.across, step, jnp.zeros((blocks.m, len(q)), jnp.float32))
        result = self.narrow.finished(total, given, m, q, None)
        store(outs[-1], (problem, m[:, None], q[None, :]), result, both(down(rows), columns))

    def whole_rows(self, refs: Sequence[Any], problem: Any, m: Any) -> Any:
        """All of a product's left operand for some rows, which every column reads; None if it is too much to keep."""
        part = self.parts[self.wide]
        op, rows = part.tiled.op, part.tiled.masks(m, m)[0]
        if op.kind != "dot" or op.k > AT_ONCE or op.k != tile(op.k):
            return None
        x, _, _ = part.sources(refs, problem)
        k = jnp.arange(op.k, dtype=jnp.int32)
        return load(x, (problem, m[:, None], k[None, :]), down(rows))


def chain_of(links: Sequence[Link], blocks: Blocks) -> Chain:
    groups, per_group = links[0].lhs.shape[:2]
    wide = 1 if any(y is None for y in links[1].operands) else 0
    assert wide + 1 == len(links) or links[wide].op.n % blocks.n == 0, f"no tiles of {links[wide].op.n}: {blocks}"
    parts = [
        part_of(link, per_group, blocks if i <= wide else below_it(link.op, blocks)) for i, link in enumerate(links)
    ]
    return Chain(tuple(parts), wide, groups)


def below_it(narrow: HeavyOp, blocks: Blocks) -> Blocks:
    """All columns of a narrow product, in steps of the wide one's tile."""
    return Blocks(blocks.m, tile(narrow.n), blocks.n, blocks.warps, blocks.stages)


def part_of(link: Link, per_group: int, blocks: Blocks) -> Part:
    epilogue, there = link.epilogue, [y for y in link.operands if y is not None]
    inner = next((i for i, y in enumerate(link.operands) if y is None), None)
    reads = epilogue
    if epilogue and inner is not None:
        reads = replace(epilogue, kinds=epilogue.kinds[:inner] + epilogue.kinds[inner + 1 :])
    left = None if link.lhs is None else positions(link.op, link.lhs)
    return Part(Tiled(link.op, per_group, blocks, epilogue), left, by_problem(link.op, link.rhs, reads, there), inner)
