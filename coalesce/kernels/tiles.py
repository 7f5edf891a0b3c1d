"""A dot or convolution, tile by tile, inside a Pallas kernel: sum over blocks of K of rows [m, k] x weights [k, n],
then the epilogue. No copy of a window, a patch or a weight is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels.epilogue import End, Epilogue, WHOLE
from coalesce.kernels.operands import Source
from coalesce.kernels.triton import both, div, dot, load, rem, store
from coalesce.kernels.windows import Windows, windows_of

# What tensor cores do with operands of 16 bits, for whoever asks for it by name.
USUAL = {"bfloat16": lax.DotAlgorithmPreset.BF16_BF16_F32, "float16": lax.DotAlgorithmPreset.F16_F16_F32}


def precision_of(op: HeavyOp) -> Any:
    """Of both operands, which is one for all that the kernels run."""
    return op.precision[0] if isinstance(op.precision, tuple) else op.precision


def unnamed(op: HeavyOp) -> HeavyOp:
    """An op that asks by name for what a kernel does with its dtype, as one that asks for nothing."""
    if op.kind != "dot" or op.rhs.dtype != op.lhs.dtype or op.precision is not USUAL.get(str(op.lhs.dtype), USUAL):
        return op
    return replace(op, params={**op.params, "precision": None})


def by_columns(op: HeavyOp) -> bool:
    """Whether a right operand lies as [N, K] rather than [K, N]: tensor cores take 32-bit operands along K alone, and
    to turn a tile takes longer than its product. With batch dimensions it is no weight, and lies as it came."""
    return op.rhs.dtype.itemsize == 4 and op.batch == 1


@dataclass(frozen=True)
class Tiled:
    """An op's problems [rows, K] x [K, columns] in tiles. `per_group` lanes share the right operand of a problem: they
    are rows of it, one lane after the other."""

    op: HeavyOp
    per_group: int
    blocks: Blocks
    epilogue: Epilogue | None = None

    @cached_property
    def windows(self) -> Windows:
        return windows_of(self.op)

    @property
    def rows(self) -> int:
        return self.per_group * self.op.m

    @property
    def parts(self) -> int:
        return self.epilogue.parts if self.epilogue else 1

    @property
    def strip(self) -> int:
        """Columns of a strip, all of them unless the epilogue takes them apart."""
        return self.op.n // self.parts

    @property
    def columns(self) -> int:
        """Columns that a tile has of each strip, so that it has as many of all as its blocks say."""
        return self.blocks.n if self.parts == 1 else max(16, share(self.blocks.n, self.parts))

    @property
    def across(self) -> int:
        return pl.cdiv(self.strip, self.columns)

    @property
    def count(self) -> int:
        """Tiles of a problem."""
        return pl.cdiv(self.rows, self.blocks.m) * self.across

    @property
    def whole_taps(self) -> bool:
        """Whether a block of K lies within one tap, so that a row has one position in it. Where channels are few,
        blocks take several taps instead."""
        windows, k = self.windows, self.blocks.k
        return pl.cdiv(windows.channels, k) * k * 3 <= windows.channels * 4 or windows.tap_count == 1

    @property
    def steps(self) -> int:
        """Blocks of K."""
        windows, k = self.windows, self.blocks.k
        return windows.tap_count * pl.cdiv(windows.channels, k) if self.whole_taps else pl.cdiv(windows.k, k)

    def outs(self, problems: int) -> list[jax.ShapeDtypeStruct]:
        left = self.epilogue.left if self.epilogue else (End(self.op.out.dtype),)
        return [jax.ShapeDtypeStruct((problems, self.rows, end.strips * self.strip), end.dtype) for end in left]

    def run(self, tile: Any, problem: Any, x: Any, w: Source, given: Sequence[Source], ys: Sequence[Any]) -> None:
        """Compute a tile of a problem and write it.

        References: x [P, positions, C]; w a row of [S, K, N], or of [S, N, K] (see `by_columns`); of the results
        [P, rows, columns]; of what the epilogue reads, a row of [P, rows, columns] if WHOLE, else a vector of
        [P, columns], or [P, lanes, columns] if several lanes share a problem. All columns are N, or some strips.
        """
        m = div(tile, self.across) * self.blocks.m + jnp.arange(self.blocks.m, dtype=jnp.int32)
        n = rem(tile, self.across) * self.columns + jnp.arange(self.columns, dtype=jnp.int32)
        rows, columns = self.masks(m, n)
        mask = both(down(rows), along(columns))
        totals = self.products(problem, x, w, m, n, rows, columns)
        for y, tiles in zip(ys, self.results(totals, given, m, n), strict=True):
            for i, result in enumerate(tiles):
                store(y, (problem, m[:, None], self.behind(i, n)[None, :]), result, mask)

    def masks(self, m: Any, n: Any) -> tuple[Any, Any]:
        """Which rows and columns of a tile there are."""
        return below(m, self.rows, self.blocks.m), below(n, self.strip, self.columns)

    def behind(self, strips: int, n: Any) -> Any:
        """Columns that lie so many strips behind n."""
        return n + strips * self.strip if strips else n

    def finished(self, total: Any, given: Sequence[Source | jax.Array], m: Any, n: Any) -> Any:
        """Rows m and columns n of the one result, from those of the product; what the epilogue reads may be a tile."""
        ((result,),) = self.results((total,), given, m, n)
        return result

    def results(self, totals: Sequence[Any], given: Sequence[Source | jax.Array], m: Any, n: Any) -> list[list[Any]]:
        """Of each result rows m, and columns n of each strip, from those of the product."""
        op, epilogue = self.op, self.epilogue
        rows, columns = self.masks(m, n)
        mask = both(down(rows), along(columns))
        tiles = [total.astype(op.out.dtype) for total in totals]
        if epilogue is None:
            return [tiles]

        def operand(source: Source | jax.Array, kind: str, strips: int, i: int) -> Any:
            if not isinstance(source, Source):
                return source
            length, at = strips * self.strip, self.behind(i, n)
            if kind == WHOLE:
                return source.load((m[:, None], at[None, :]), length, mask)
            if self.per_group > 1:
                return source.load((div(m, op.m)[:, None], at[None, :]), length, mask)
            vector = source.load((at[None, :],), length, along(columns))
            return jnp.broadcast_to(vector, (self.blocks.m, self.columns))

        strips = map(epilogue.strips_of, range(len(given)))
        each = zip(given, epilogue.kinds, strips, strict=True)
        return epilogue.results(tiles, [[operand(z, kind, s, i) for i in range(s)] for z, kind, s in each])

    def product(self, problem: Any, x: Any, w: Source, m: Any, n: Any, rows: Any, columns: Any) -> jax.Array:
        """`products` of an epilogue that takes no columns apart."""
        (total,) = self.products(problem, x, w, m, n, rows, columns)
        return total

    def products(
        self, problem: Any, x: Any, w: Source, m: Any, n: Any, rows: Any, columns: Any
    ) -> tuple[jax.Array, ...]:
        """Rows m of a problem's product, and columns n of each strip, in float32; masks say which of them there are."""
        windows, blocks = self.windows, self.blocks
        corners = windows.corners(m)
        channels = windows.channels
        by_tap, whole_taps = pl.cdiv(channels, blocks.k), self.whole_taps
        ranged = jnp.arange(blocks.k, dtype=jnp.int32)
        precision = precision_of(self.op)

        def step(i: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            if whole_taps:
                c = rem(i, by_tap) * blocks.k + ranged
                tap = div(i, by_tap)
                k, fits = tap * channels + c, below(c, channels, blocks.k)
                position, inside = windows.at(corners, tap)
                position, inside = position[:, None], down(inside)
            else:
                k = i * blocks.k + ranged
                c, fits = rem(k, channels), below(k, windows.k, blocks.k)
                image, place = corners
                spread = image[:, None], [p[:, None] for p in place]
                position, inside = windows.at(spread, div(k, channels)[None, :])
            a = load(x, (problem, position, c[None, :]), both(inside, down(rows), along(fits)))
            return tuple(total + times(a, k, fits, self.behind(p, n)) for p, total in enumerate(totals))

        def times(a: Any, k: Any, fits: Any, n: Any) -> Any:
            if by_columns(self.op):
                b = w.load((n[:, None], k[None, :]), windows.k, both(down(columns), along(fits)))
                return dot(a, b, precision, by_columns=True)
            b = w.load((k[:, None], n[None, :]), self.op.n, both(down(fits), along(columns)))
            return dot(a, b, precision)

        zeros = tuple(jnp.zeros((blocks.m, self.columns), jnp.float32) for _ in range(self.parts))
        return lax.fori_loop(0, self.steps, step, zeros)


def share(size: int, parts: int) -> int:
    """The largest power of two that goes into a size so many times, 1 at least."""
    return 1 << max(0, (size // parts).bit_length() - 1)


# Masks over rows or columns of a tile; None is one that is set everywhere, and costs nothing.


def below(index: Any, size: int, block: int) -> Any:
    return None if size % block == 0 else index < size


def down(mask: Any) -> Any:
    return None if mask is None else mask[:, None]


def along(mask: Any) -> Any:
    return None if mask is None else mask[None, :]
