"""Products that follow one another in one launch: what one computes the next one reads tile by tile, where it is.

    feed      [rows, J] x [J, N]   computes what the wide one's epilogue adds: a shortcut
    head      [rows, I] x [I, K]   computes the wide one's left operand
    wide      [rows, K] x [K, N]   and its epilogue
    narrow    [rows, N] x [N, n]   multiplies the wide one's result, tile by tile, and sums

A program has some rows of a problem. It keeps all that the head computes for them, goes through the wide product's
columns tile by tile, and keeps the sums of the narrow one, which are written last: of a bottleneck of a ResNet only the
residual is read and written. A feed, or a narrow product, may be all that there is beside the wide one; then, without a
narrow product, a program has one tile of columns. What nobody else reads is not written.

Blocks are the wide product's: m rows by n columns, and steps of k for what is summed over more than is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels import indexed_gemm
from coalesce.kernels.epilogue import Epilogue
from coalesce.kernels.indexed_gemm import by_problem, positions, tile
from coalesce.kernels.operands import Operands
from coalesce.kernels.tiles import along, down, Tiled
from coalesce.kernels.triton import both, div, dot, launch, load, rem, store

KERNEL = "indexed_gemm"  # whose weights these are
MOST_SUMS = 256  # of a row, that a program keeps
MOST_KEPT = 128  # of the wide product's K


@dataclass(frozen=True, eq=False)
class Link:
    """A product as `indexed_gemm.run` takes it. None is what a link before it computes: the left operand, or one of
    those of the epilogue."""

    op: HeavyOp
    lhs: Any
    rhs: Any
    epilogue: Epilogue | None
    operands: Sequence[Any]
    written: bool = True


def supports(feed: HeavyOp | None, head: HeavyOp | None, wide: HeavyOp, narrow: HeavyOp | None) -> bool:
    """Operands of 16 bits: wider ones lie by columns, and a tile would have to be turned."""
    every = [op for op in (feed, head, wide, narrow) if op]
    if not all(indexed_gemm.supports(op) and op.batch == 1 and op.lhs.dtype.itemsize == 2 for op in every):
        return False
    if feed and feed.out.shape != wide.out.shape:
        return False
    if head and not (narrow and follows(head, wide) and keeps(wide)):
        return False
    return narrow is None or (follows(wide, narrow) and narrow.n <= MOST_SUMS)


def follows(first: HeavyOp, op: HeavyOp) -> bool:
    """Whether an op multiplies the rows of another one's result, as they are."""
    if op.kind != "dot" or op.lhs.shape != first.out.shape or op.k != first.n or len(op.rhs.shape) != 2:
        return False
    ((contracted, _), _) = op.params["dimension_numbers"]
    return contracted == (len(op.lhs.shape) - 1,)


def keeps(wide: HeavyOp) -> bool:
    """Whether a program keeps all of K of its rows."""
    return wide.kind == "dot" and tile(wide.k) == wide.k <= MOST_KEPT


def run(links: Sequence[Link], blocks: Blocks) -> list[Any]:
    """Of each link its result [G,R,*out], or None if it is not written."""
    chain = chain_of(links, blocks)
    written = [link.written for link in links]
    outs = [part.tiled.outs(chain.problems)[0] for part, own in zip(chain.parts, written, strict=True) if own]

    def kernel(*refs: Any) -> None:
        given, results = iter(refs[: -len(outs)]), iter(refs[-len(outs) :])
        places = [
            Place(part, [next(given) for _ in part.args], next(results) if own else None, pl.program_id(1))
            for part, own in zip(chain.parts, written, strict=True)
        ]
        chain.write(pl.program_id(0), chain.roles(places))

    args = [arg for part in chain.parts for arg in part.args]
    grid = chain.count, chain.problems
    ys = iter(launch(kernel, grid, outs, args, name=chain.name, warps=blocks.warps, stages=blocks.stages))
    lanes = links[0].lhs.shape[:2]
    return [next(ys).reshape(*lanes, *link.op.out.shape) if link.written else None for link in links]


@dataclass(frozen=True, eq=False)
class Part:
    """A link as the kernel has it."""

    tiled: Tiled
    left: Any  # [P, positions, C]; None: a tile
    operands: Operands  # weights, and what the epilogue reads, without a tile
    inner: int | None  # which of the epilogue's operands is a tile

    @property
    def args(self) -> tuple[Any, ...]:
        left = () if self.left is None else (self.left,)
        return (*self.operands.scalars, *left, *self.operands.arrays)


@dataclass(frozen=True, eq=False)
class Place:
    """A part in a program: references to its arguments, and to its result if it is written."""

    part: Part
    refs: Sequence[Any]
    out: Any
    problem: Any

    def sources(self) -> tuple[Any, Any, list[Any]]:
        """The left operand, the weights, and what the epilogue reads."""
        operands, has_left = self.part.operands, self.part.left is not None
        first = len(operands.scalars)
        weights, *given = operands.sources(self.refs[first + has_left :], self.refs[:first], self.problem)
        return (self.refs[first] if has_left else None), weights, given

    def rows(self, m: Any) -> Any:
        """All of the left operand's columns."""
        x, _, _ = self.sources()
        k = jnp.arange(self.part.tiled.op.k, dtype=jnp.int32)
        return load(x, (self.problem, m[:, None], k[None, :]), down(self.part.tiled.masks(m, k)[0]))

    def total(self, m: Any, n: Any, left: Any = None) -> Any:
        """The sums of a tile; `left` is its left operand's tile, all of K or the columns of one that are multiplied."""
        tiled = self.part.tiled
        x, w, _ = self.sources()
        rows, columns = tiled.masks(m, n)
        return tiled.product(self.problem, x, w, m, n, rows, columns) if left is None else self.of(left, 0, n)

    def of(self, left: Any, first: Any, n: Any) -> Any:
        """A tile of the left operand, whose first column is given, times the weights."""
        tiled = self.part.tiled
        _, w, _ = self.sources()
        k = first + jnp.arange(left.shape[1], dtype=jnp.int32)
        return dot(left, w.load((k[:, None], n[None, :]), tiled.op.n, along(tiled.masks(n, n)[1])), None)

    def finish(self, total: Any, m: Any, n: Any, inner: Any = None) -> Any:
        """A tile of the result, from its sums; it is written if the result is."""
        tiled, (_, _, given) = self.part.tiled, self.sources()
        if self.part.inner is not None:
            given.insert(self.part.inner, inner)
        result = tiled.finished(total, given, m, n)
        if self.out is not None:
            rows, columns = tiled.masks(m, n)
            store(self.out, (self.problem, m[:, None], n[None, :]), result, both(down(rows), along(columns)))
        return result


class Roles(NamedTuple):
    feed: Any
    head: Any
    wide: Any
    narrow: Any


@dataclass(frozen=True, eq=False)
class Chain:
    parts: tuple[Part, ...]
    problems: int

    def roles(self, each: Sequence[Any]) -> Roles:
        """Of what there is for each part: those that read a tile as their left operand are last."""
        behind = sum(part.left is None for part in self.parts)
        *before, wide = each[:-1] if behind else each
        head = before.pop() if behind > 1 else None
        return Roles(before[0] if before else None, head, wide, each[-1] if behind else None)

    @property
    def count(self) -> int:
        """Programs of a problem."""
        _, _, wide, narrow = self.roles(self.parts)
        return wide.tiled.count // wide.tiled.across if narrow else wide.tiled.count

    @property
    def name(self) -> str:
        sizes = "_".join(f"{part.tiled.op.n}x{part.tiled.op.k}" for part in self.parts)
        return f"chain_{self.problems}x{self.parts[0].tiled.rows}x{sizes}"

    def write(self, program: Any, roles: Roles) -> None:
        feed, head, wide, narrow = roles
        tiled, blocks = wide.part.tiled, wide.part.tiled.blocks
        across = 1 if narrow else tiled.across
        m = div(program, across) * blocks.m + jnp.arange(blocks.m, dtype=jnp.int32)
        left = None
        if head:
            k = jnp.arange(tiled.op.k, dtype=jnp.int32)
            left = head.finish(head.total(m, k), m, k)
        elif narrow and keeps(tiled.op):
            left = wide.rows(m)

        def column(first: Any) -> Any:
            n = first + jnp.arange(blocks.n, dtype=jnp.int32)
            inner = feed.finish(feed.total(m, n), m, n) if feed else None
            return wide.finish(wide.total(m, n, left), m, n, inner)

        if not narrow:
            column(rem(program, across) * blocks.n)
            return
        n = jnp.arange(narrow.part.tiled.blocks.n, dtype=jnp.int32)

        def step(i: Any, total: Any) -> Any:
            return total + narrow.of(column(i * blocks.n), i * blocks.n, n)

        total = lax.fori_loop(0, tiled.across, step, jnp.zeros((blocks.m, len(n)), jnp.float32))
        narrow.finish(total, m, n)


def chain_of(links: Sequence[Link], blocks: Blocks) -> Chain:
    groups, per_group = links[0].lhs.shape[:2]
    without = [part_of(link, per_group, blocks) for link in links]
    _, head, wide, narrow = Chain(tuple(without), groups).roles(without)
    assert narrow is None or wide.tiled.op.n % blocks.n == 0, f"no tiles of {wide.tiled.op.n} columns: {blocks}"
    return Chain(tuple(across(part, part in (head, narrow)) for part in without), groups)


def across(part: Part, all_columns: bool) -> Part:
    blocks = part.tiled.blocks
    wider = replace(blocks, n=tile(part.tiled.op.n)) if all_columns else blocks
    return replace(part, tiled=replace(part.tiled, blocks=wider))


def part_of(link: Link, per_group: int, blocks: Blocks) -> Part:
    epilogue, there = link.epilogue, [y for y in link.operands if y is not None]
    inner = next((i for i, y in enumerate(link.operands) if y is None), None)
    reads = epilogue
    if epilogue and inner is not None:
        reads = replace(epilogue, kinds=epilogue.kinds[:inner] + epilogue.kinds[inner + 1 :])
    left = None if link.lhs is None else positions(link.op, link.lhs)
    return Part(Tiled(link.op, per_group, blocks, epilogue), left, by_problem(link.op, link.rhs, reads, there), inner)
