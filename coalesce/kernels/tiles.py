"""A dot or convolution, tile by tile, inside a Pallas kernel: sum over blocks of K of rows [m, k] x weights [k, n],
then the epilogue. No copy of a window, a patch or a weight is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels.epilogue import Epilogue, WHOLE
from coalesce.kernels.triton import both, div, dot, load, rem, store
from coalesce.kernels.windows import Windows, windows_of
from coalesce.slab import Cut, Picked


@dataclass(frozen=True)
class Source:
    """What a kernel reads a row of an array from: the array itself, or the slab that it lies in."""

    ref: Any
    start: int | None
    row: Any

    def load(self, place: tuple[Any, ...], length: int, mask: Any) -> Any:
        """The elements of the row at `place`: (i,), or (i, j) where j counts to `length`."""
        if self.start is None:
            return load(self.ref, (self.row, *place), mask)
        flat = place[0] if len(place) == 1 else place[0] * length + place[1]
        return load(self.ref, (self.row, flat + self.start), mask)


def precision_of(op: HeavyOp) -> Any:
    """Of both operands, which is one for all that the kernels run."""
    return op.precision[0] if isinstance(op.precision, tuple) else op.precision


def by_columns(op: HeavyOp) -> bool:
    """Whether a right operand lies as [N, K] rather than [K, N]: tensor cores take 32-bit operands along K alone, and
    to turn a tile takes longer than its product. With batch dimensions it is no weight, and lies as it came."""
    return op.rhs.dtype.itemsize == 4 and op.batch == 1


@dataclass(frozen=True)
class Operands:
    """What a launch gets for arrays, cuts, and rows of these that are picked: slots, if any are; the arrays to read
    from; and for each where in it to begin, and whether problem p reads row slots[p] of it rather than row p."""

    slots: tuple[Any, ...]
    arrays: tuple[Any, ...]
    starts: tuple[int | None, ...]
    picked: tuple[bool, ...]

    def sources(self, refs: Sequence[Any], slots: Sequence[Any], problem: Any) -> list[Source]:
        """Where a problem reads each, from references to `arrays` and to `slots`."""
        row = slots[0][problem] if slots else problem
        each = zip(refs, self.starts, self.picked, strict=True)
        return [Source(ref, start, row if picked else problem) for ref, start, picked in each]


def operands_of(values: Sequence[Any]) -> Operands:
    picked = [v for v in values if isinstance(v, Picked)]
    lie = [v.array if isinstance(v, Picked) else v for v in values]
    return Operands(
        tuple(v.slots.astype(jnp.int32) for v in picked[:1]),  # of one family, whose lanes have one slot each
        tuple(v.slab if isinstance(v, Cut) else v for v in lie),
        tuple(v.start if isinstance(v, Cut) else None for v in lie),
        tuple(isinstance(v, Picked) for v in values),
    )


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
    def across(self) -> int:
        return pl.cdiv(self.op.n, self.blocks.n)

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

    def out(self, problems: int) -> jax.ShapeDtypeStruct:
        dtype = self.epilogue.dtype if self.epilogue else self.op.out.dtype
        return jax.ShapeDtypeStruct((problems, self.rows, self.op.n), dtype)

    def run(self, tile: Any, problem: Any, x: Any, w: Source, given: Sequence[Source], y: Any) -> None:
        """Compute a tile of a problem and write it.

        References: x [P, positions, C]; w a row of [S, K, N], or of [S, N, K] (see `by_columns`); y [P, rows, N]; of
        what the epilogue reads, a row of [P, rows, N] if WHOLE, else a vector of [P, N], or [P, lanes, N] if several
        lanes share a problem.
        """
        blocks = self.blocks
        m = div(tile, self.across) * blocks.m + jnp.arange(blocks.m, dtype=jnp.int32)
        n = rem(tile, self.across) * blocks.n + jnp.arange(blocks.n, dtype=jnp.int32)
        rows, columns = self.masks(m, n)
        result = self.finished(self.product(problem, x, w, m, n, rows, columns), given, m, n)
        store(y, (problem, m[:, None], n[None, :]), result, both(down(rows), along(columns)))

    def masks(self, m: Any, n: Any) -> tuple[Any, Any]:
        """Which rows and columns of a tile there are."""
        return below(m, self.rows, self.blocks.m), below(n, self.op.n, self.blocks.n)

    def finished(self, total: Any, given: Sequence[Source | jax.Array], m: Any, n: Any) -> Any:
        """Rows m and columns n of the result, from those of the product; what the epilogue reads may be a tile."""
        op, blocks = self.op, self.blocks
        rows, columns = self.masks(m, n)
        mask = both(down(rows), along(columns))

        def operand(source: Source | jax.Array, kind: str) -> Any:
            if not isinstance(source, Source):
                return source
            if kind == WHOLE:
                return source.load((m[:, None], n[None, :]), op.n, mask)
            if self.per_group > 1:
                return source.load((div(m, op.m)[:, None], n[None, :]), op.n, mask)
            vector = source.load((n[None, :],), op.n, along(columns))
            return jnp.broadcast_to(vector, (blocks.m, blocks.n))

        result = total.astype(op.out.dtype)
        return self.epilogue.apply(result, *map(operand, given, self.epilogue.kinds)) if self.epilogue else result

    def product(self, problem: Any, x: Any, w: Source, m: Any, n: Any, rows: Any, columns: Any) -> jax.Array:
        """Rows m and columns n of a problem's product, in float32; masks say which of them there are."""
        windows, blocks = self.windows, self.blocks
        corners = windows.corners(m)
        channels = windows.channels
        by_tap, whole_taps = pl.cdiv(channels, blocks.k), self.whole_taps
        ranged = jnp.arange(blocks.k, dtype=jnp.int32)
        precision = precision_of(self.op)

        def step(i: Any, total: Any) -> Any:
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
            if by_columns(self.op):
                b = w.load((n[:, None], k[None, :]), windows.k, both(down(columns), along(fits)))
                return total + dot(a, b, precision, by_columns=True)
            b = w.load((k[:, None], n[None, :]), self.op.n, both(down(fits), along(columns)))
            return total + dot(a, b, precision)

        return lax.fori_loop(0, self.steps, step, jnp.zeros((blocks.m, blocks.n), jnp.float32))


# Masks over rows or columns of a tile; None is one that is set everywhere, and costs nothing.


def below(index: Any, size: int, block: int) -> Any:
    return None if size % block == 0 else index < size


def down(mask: Any) -> Any:
    return None if mask is None else mask[:, None]


def along(mask: Any) -> Any:
    return None if mask is None else mask[None, :]
