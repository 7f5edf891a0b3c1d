"""A program of mosaic_gemm: one warpgroup fetches blocks into places in shared memory, others multiply what is there.

    fetch      wait until a place is free, copy into it         places in turns, several of them ahead
    multiply   wait until it is there, multiply, free the place before it

Clusters of programs that share what they fetch (multicast) were measured on an H100: none was faster.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from coalesce.kernels.epilogue import Epilogue, WHOLE
from coalesce.kernels.mosaic import (
    backend,
    Columns,
    Images,
    memory,
    memory_over,
    parted,
    Rows,
    wait_if,
)
from coalesce.kernels.mosaic_columns import Beside
from coalesce.kernels.mosaic_registers import share_registers
from coalesce.kernels.mosaic_share import At, Part, share_of, Turned, Upright
from coalesce.kernels.mosaic_tile import Tile
from coalesce.kernels.triton import div, rem

# The axes of a launch, besides "group", the warpgroup.
IMAGE, TILE, PART = "image", "tile", "part"


@dataclass(frozen=True)
class Source:
    """Where a launch reads an operand: rows of an array, each for some images, from a place in them on.

    The place is data, so that layers of one shape are one kernel: of weights it is counted in rows, of vectors in
    elements.
    """

    images: int  # that share a row
    picked: bool
    start: int | None  # its number among the starts that the launch is given; None: 0

    def find(self, image: Any, slots: Any, starts: Any) -> tuple[Any, Any]:
        """(row, start) for an image; references, which are None where they are not read."""
        row = div(image, self.images)
        return slots[row] if self.picked else row, 0 if self.start is None else starts[self.start]


@dataclass(frozen=True, eq=False)
class Program:
    """`sources` are those of the weights and then of the epilogue's operands. Equal ones compute the same."""

    tile: Tile
    sources: tuple[Source, ...]
    epilogue: Epilogue | None
    work: Hashable  # what the epilogue computes
    dtype: Any  # of the result
    interpreted: bool

    @cached_property
    def key(self) -> Hashable:
        tile = self.tile
        op = (tile.op.key, tile.op.context, str(tile.op.out.dtype))
        how = (self.sources, self.kinds, self.work, str(self.dtype), self.interpreted)
        return (op, tile.blocks, tile.tall, tile.wide, how)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.epilogue.kinds if self.epilogue else ()

    @property
    def left(self) -> Images:
        tile = self.tile
        return Images(
            (tile.left_stages, tile.deep), tile.halo, tile.wide, jnp.dtype(tile.op.lhs.dtype), self.interpreted
        )

    @property
    def right(self) -> Columns | Rows:
        tile, dtype = self.tile, jnp.dtype(self.tile.op.rhs.dtype)
        k, n = tile.blocks.k, tile.blocks.n
        return (Columns if tile.by_columns else Rows)(tile.right_stages, k, n, dtype, self.interpreted)

    @property
    def result(self) -> Images:
        """Of the result, and before that of the operand that has its size."""
        tile = self.tile
        return (Beside if tile.blocks.turned else Images)(
            (tile.parts,), tile.tall, tile.wide, self.dtype, self.interpreted
        )

    def memory(self, vectors: Sequence[Any]) -> dict[str, Any]:
        """What a program has for itself; `vectors` are the dtypes of the epilogue's columns."""
        plgpu, tile = backend(), self.tile
        ready = len(vectors) + self.kinds.count(WHOLE) * tile.parts * self.result.count(tile.tall)
        return {
            **self.blocks_memory(),
            "vectors": [plgpu.SMEM((tile.blocks.n,), dtype) for dtype in vectors],
            "left_there": plgpu.Barrier(
                num_arrivals=tile.deep * sum(self.left.count(band.count) for band in tile.bands),
                num_barriers=tile.left_stages,
            ),
            "right_there": plgpu.Barrier(num_arrivals=self.right.count, num_barriers=tile.right_stages),
            "left_free": plgpu.Barrier(num_arrivals=tile.groups, num_barriers=tile.left_stages),
            "right_free": plgpu.Barrier(num_arrivals=tile.groups, num_barriers=tile.right_stages),
            "ready": plgpu.Barrier(num_arrivals=max(1, ready), num_barriers=1),
            "done": plgpu.Barrier(num_arrivals=tile.groups, num_barriers=1),
            **({"multiplied": plgpu.Barrier(num_arrivals=tile.groups, num_barriers=1)} if tile.blocks.over else {}),
        }

    def blocks_memory(self) -> dict[str, Any]:
        left, right, result = self.left.views(), self.right.views(), self.result.views()
        if self.tile.blocks.over and not self.interpreted:
            return {"over": memory_over((left, right), result)}
        return {"lefts": memory(left), "rights": memory(right), "outs": memory(result)}

    def run(self, slots: Any, starts: Any, x: Any, arrays: Sequence[Any], y: Any, memory: dict[str, Any]) -> None:
        """Compute a tile. References: slots and starts, None if no source needs them; x [images, *phases, C]; arrays as
        `sources` say, whole ones [images, *out, N]."""
        tile = self.tile
        if "over" in memory:
            (lefts, rights), outs = parted(memory["over"])
            memory = {**memory, "lefts": lefts, "rights": rights, "outs": outs}
        at = lax.axis_index(TILE)
        place = Place(
            lax.axis_index(IMAGE),
            div(at, tile.across) * tile.tall,
            rem(at, tile.across) * tile.wide,
            lax.axis_index(PART) * tile.blocks.n,
        )
        group = lax.axis_index("group")

        def fetch() -> None:
            share_registers(tile.groups, fetching=True)
            self.fetch(self.found(place, slots, starts), x, arrays, place, memory)

        def compute() -> None:
            share_registers(tile.groups, fetching=False)
            self.compute(group, y, place, memory)

        lax.cond(group == tile.groups, fetch, compute)

    # ---- one warpgroup ---------------------------------------------------------------------------------------------

    def found(self, place: Place, slots: Any, starts: Any) -> list[tuple[Any, Any]]:
        """Of each source. They are read one behind the other, so that one waits once for all of them."""
        return [source.find(place.image, slots, starts) for source in self.sources]

    def fetch(self, found: Sequence[Any], x: Any, arrays: Sequence[Any], place: Place, memory: dict[str, Any]) -> None:
        plgpu, tile = backend(), self.tile
        (down, taps), chunks = tile.taps, tile.channels // tile.blocks.k
        # Interpreted, an index below 0 is read as 0: there the operand has its border.
        above, before = (0, tile.outside[1]) if not self.interpreted else (tile.outside[0], 0)
        across = tile.strides[1]
        row, start = found[0]

        def step(i: Any, _: Any) -> None:
            column, c = div(i, chunks), rem(i, chunks) * tile.blocks.k
            stage = rem(i, tile.left_stages)
            wait_if(i >= tile.left_stages, memory["left_free"], stage)
            w = column + tile.outside[1] * across - tile.before[1]
            columns = pl.ds(place.w + div(w, across) - before, tile.wide)
            for d, band in product(range(tile.deep), tile.bands):
                for rows, to in self.left.copies(memory["lefts"], (stage, d), band.count, band.begin):
                    h = rows(place.h + band.first + above)
                    channels = pl.ds(c + d * tile.row, tile.row)
                    part = x.at[place.image, h, band.phase, columns, rem(w, across), channels]
                    plgpu.copy_gmem_to_smem(part, to, memory["left_there"].at[stage])
            for tap in range(down):
                j = i * down + tap
                stage = rem(j, tile.right_stages)
                wait_if(j >= tile.right_stages, memory["right_free"], stage)
                k = (tap * taps + column) * tile.channels + c
                for part, to in self.right.copies(memory["rights"], stage, row, start, k, place.n):
                    plgpu.copy_gmem_to_smem(arrays[0].at[part], to, memory["right_there"].at[stage])

        step(jnp.int32(0), None)  # before what is needed last
        self.fetch_vectors(found[1:], arrays[1:], place, memory)
        if not tile.blocks.over:
            self.fetch_wholes(arrays[1:], place, memory)
        lax.fori_loop(1, tile.steps, step, None)
        if tile.blocks.over and WHOLE in self.kinds:
            plgpu.barrier_wait(memory["multiplied"].at[0])
            self.fetch_wholes(arrays[1:], place, memory)

    def fetch_vectors(self, found: Sequence[Any], arrays: Sequence[Any], place: Place, memory: dict[str, Any]) -> None:
        vectors = iter(memory["vectors"])
        for kind, (row, start), array in zip(self.kinds, found, arrays, strict=True):
            if kind != WHOLE:
                span = pl.ds(start + place.n, self.tile.blocks.n)
                backend().copy_gmem_to_smem(array.at[row, span], next(vectors), memory["ready"].at[0])

    def fetch_wholes(self, arrays: Sequence[Any], place: Place, memory: dict[str, Any]) -> None:
        for array in (y for kind, y in zip(self.kinds, arrays, strict=True) if kind == WHOLE):
            for part in range(self.tile.parts):
                for rows, to in self.result.copies(memory["outs"], (part,), self.tile.tall):
                    there = self.there(array, rows, part, place)
                    backend().copy_gmem_to_smem(there, to, memory["ready"].at[0])

    def there(self, array: Any, rows: Callable[[Any], Any], part: int, place: Place) -> Any:
        """A part of the tile's columns in an array of the result's shape."""
        row = self.tile.row
        return array.at[place.image, rows(place.h), pl.ds(place.w, self.tile.wide), pl.ds(place.n + part * row, row)]

    # ---- the others ------------------------------------------------------------------------------------------------

    def compute(self, group: Any, y: Any, place: Place, memory: dict[str, Any]) -> None:
        plgpu, tile, share = backend(), self.tile, share_of(self.tile)
        acc = plgpu.ACC(share.sums, jnp.float32)
        result = pl.run_scoped(lambda acc: self.multiply(acc, group, share, memory), acc)
        if tile.blocks.over:  # what others still multiply, or fetch for all, lies where this one writes
            plgpu.barrier_arrive(memory["multiplied"].at[0])
            if WHOLE not in self.kinds:
                plgpu.barrier_wait(memory["multiplied"].at[0])
        if self.kinds:
            plgpu.barrier_wait(memory["ready"].at[0])
        for part in share.parts(group, self.result, memory["outs"]):
            part.store(self.finished(result[part.of].astype(tile.op.out.dtype), part, memory))
        plgpu.commit_smem()
        if tile.groups > 1:
            plgpu.barrier_arrive(memory["done"].at[0])

        @pl.when(group == 0)
        def _() -> None:
            if tile.groups > 1:
                plgpu.barrier_wait(memory["done"].at[0])
            for part in range(tile.parts):
                for rows, lies in self.result.copies(memory["outs"], (part,), tile.tall):
                    plgpu.copy_smem_to_gmem(lies, self.there(y, rows, part, place))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def multiply(self, acc: Any, group: Any, share: Upright | Turned, memory: dict[str, Any]) -> Any:
        """The sum of all products of a warpgroup's share."""
        plgpu, tile = backend(), self.tile
        down, lefts, rights = tile.taps[0], (self.left, memory["lefts"]), (self.right, memory["rights"])

        def step(i: Any, _: Any) -> None:
            left = rem(i, tile.left_stages)
            plgpu.barrier_wait(memory["left_there"].at[left])
            for tap in range(down):
                j = i * down + tap
                right = rem(j, tile.right_stages)
                plgpu.barrier_wait(memory["right_there"].at[right])
                for d in range(tile.deep):
                    share.multiply(acc, group, lefts, rights, At(left, right, tap, d))
                plgpu.wgmma_wait(tile.deep)  # what came before these products is done

                @pl.when(j > 0)
                def _(i: Any = i, j: Any = j, tap: int = tap) -> None:
                    plgpu.barrier_arrive(memory["right_free"].at[rem(j - 1, tile.right_stages)])
                    if tap == 0:
                        plgpu.barrier_arrive(memory["left_free"].at[rem(i - 1, tile.left_stages)])

        lax.fori_loop(0, tile.steps, step, None)
        return acc[...]

    def finished(self, sums: Any, part: Part, memory: dict[str, Any]) -> Any:
        """A part of the tile's columns, after the epilogue."""
        if self.epilogue is None:
            return sums
        vectors = iter(memory["vectors"])
        given = [part.load() if kind == WHOLE else part.spread(next(vectors), sums.shape) for kind in self.kinds]
        return self.epilogue.apply(sums, *given)


@dataclass(frozen=True)
class Place:
    """Where a tile begins."""

    image: Any
    h: Any
    w: Any
    n: Any
