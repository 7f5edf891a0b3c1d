"""Attention of 16 bits as one Mosaic GPU kernel: wgmma on what TMA has fetched, on an H100. See kernels/attention.py.

    grid (lanes x heads, blocks of rows)
    a program: one warpgroup, GROUP rows of queries, all keys and values of their head

All copies are under way before anything is multiplied. Scores come GROUP columns at a time, and are rounded at once, so
that whole rows stay in registers; from there their weights multiply the values. Three such programs share a core, and
so hide each other's waits: on an H200 those of 197 rows take 9.4 us, with two warpgroups on the same keys 13.3 and with
four 11.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.extend.core import ClosedJaxpr

from coalesce.kernels.attention import Attention, COLUMN, Operand, padded, Place, ROW, unraveled
from coalesce.kernels.mosaic import backend, call, GROUP, Images, joins, load, lowers, memory, multiply, TOGETHER
from coalesce.kernels.mosaic_fetched import can_fetch, Fetched, fetched, in_floats, is_number, over_columns, to_the_end
from coalesce.kernels.mosaic_rows import inside, only, over_rows, WgmmaTiles, widened
from coalesce.kernels.triton import div, rem

DTYPES = ("bfloat16", "float16")
COLUMNS = 256  # of scores, at most: whole rows stay in registers
DEEP = 128  # numbers of a head, at most
PROBLEM, BLOCK = "problem", "block"  # the axes of a launch


def supports(what: Attention, operands: Sequence[Operand], out: Place) -> bool:
    """Whether it multiplies what lies somewhere as it is, in whole GROUPs of numbers a head, reads besides no more than
    vectors over columns, and does to rows what the backend has."""
    (q, k, v), others = operands[:3], operands[3:]
    dtype = str(what.scores.lhs.dtype)
    if not q.places or any(len(own.places) != 1 or own.make for own in (k, v)):
        return False
    lies = [(q.places[0], COLUMN), (k.places[0], ROW), (v.places[0], COLUMN), (out, COLUMN)]
    if dtype not in DTYPES or {str(place.array.dtype) for place, _ in lies} != {dtype}:
        return False
    if what.scores.k % GROUP or what.d % GROUP or max(what.scores.k, what.d) > DEEP or what.scores.n > COLUMNS:
        return False
    given = [place for own in others for place in own.places]
    if not all(map(is_number, q.places[1:])) or not all(map(over_columns, given)):
        return False
    # a row of values beyond the last is multiplied by zero, so it has to be a number
    lies_well = all(can_fetch(*one) for one in lies) and to_the_end(v.places[0], ROW, what.scores.n)
    return lies_well and lowers(work_on_rows(what, q, others))


def work_on_rows(what: Attention, q: Operand, others: Sequence[Operand]) -> ClosedJaxpr:
    """All that is done to tiles besides what is multiplied."""

    def work(scores: Any, tiles: Sequence[Sequence[Any]]) -> Any:
        made = [own[0] if x.make is None else x.make(own) for x, own in zip((q, *others), tiles, strict=True)]
        given = [[WgmmaTiles.spread(x, scores.shape)] for x in made[1:]]
        return made[0], list(what.rowwise([scores], given, [None], WgmmaTiles))

    def tile(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((GROUP, GROUP), dtype)

    given = [[tile(place.array.dtype) for place in x.places] for x in (q, *others)]
    return jax.make_jaxpr(work)(tile(what.scores.out.dtype), given)


def run(what: Attention, operands: Sequence[Operand], out: Place, lanes: int, interpreted: bool = False) -> Any:
    """As `attention.run`."""
    result = jax.ShapeDtypeStruct(out.array.shape, out.array.dtype)
    program = Program(
        what,
        tuple(own.make for own in operands),
        (*(fetched(own.places[0]) for own in operands[:3]), fetched(Place(result, out.dims))),
        (operands[0].places[1:], *(own.places for own in operands[3:])),
        interpreted,
    )
    arrays = [own.places[0].array.reshape(program.tiles[i].view.shape) for i, own in enumerate(operands[:3])]
    blocks = pl.cdiv(what.scores.m, GROUP)
    if interpreted:  # TMA gives zeros for what is beyond an array's end, and leaves it out
        program, arrays = extended(program, arrays)
    given = [in_floats(place, program.columns) for places in program.besides for place in places]
    y = call(
        program.run,
        {PROBLEM: lanes * prod(what.batch), BLOCK: blocks},
        1,
        program.out.view,
        (*arrays, *given),
        program.scratch(sum(x.ndim == 2 for x in given)),
        name=f"attention_{lanes * prod(what.batch)}x{what.scores.m}x{what.scores.n}x{what.scores.k}",
        interpreted=interpreted,
    )
    if interpreted:
        y = lax.slice_in_dim(y, 0, what.scores.m, axis=1 + program.out.dims.index(ROW))
    return y.reshape(result.shape)


@dataclass(frozen=True)
class Program:
    """`tiles` are those of queries, keys, values and results; `besides` is what else is read: numbers for the queries,
    then what each operand of the rows' work is made of. `makes` makes an operand of what is read, None: nothing does.
    """

    what: Attention
    makes: Sequence[Callable[[Sequence[Any]], Any] | None]
    tiles: tuple[Fetched, ...]
    besides: Sequence[Sequence[Place]]
    interpreted: bool

    @property
    def out(self) -> Fetched:
        return self.tiles[-1]

    @property
    def scored(self) -> int:
        """Columns that are computed."""
        return padded(self.what.scores.n, TOGETHER if joins() else GROUP)

    @property
    def columns(self) -> int:
        """That are multiplied by values."""
        return padded(self.what.scores.n, GROUP)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each tile of scores begins, and how wide it is."""
        return [(start, min(GROUP, self.scored - start)) for start in range(0, self.scored, GROUP)]

    def images(self, depth: int, rows: int) -> Images:
        return Images((depth // GROUP,), 1, rows, jnp.dtype(self.out.view.dtype), self.interpreted)

    @property
    def queries(self) -> Images:
        return self.images(self.what.scores.k, GROUP)

    @property
    def keys(self) -> Images:
        return self.images(self.what.scores.k, self.scored)

    @property
    def values(self) -> Images:
        return self.images(self.what.d, self.columns)

    @property
    def results(self) -> Images:
        return self.images(self.what.d, GROUP)

    @property
    def left_in(self) -> str:
        """Results lie where queries did, which have been read by then, if they are as large."""
        return "queries" if self.results == self.queries else "results"

    def scratch(self, vectors: int) -> dict[str, Any]:
        plgpu = backend()
        own = {"queries": self.queries, "keys": self.keys, "values": self.values, self.left_in: self.results}
        if self.interpreted:
            own["through"] = self.images(GROUP, GROUP)
        arrivals = self.queries.before[0] + self.keys.before[0] + vectors
        return {
            **{name: memory(images.views()) for name, images in own.items()},
            "vectors": [plgpu.SMEM((self.columns,), jnp.float32) for _ in range(vectors)],
            "there": plgpu.Barrier(num_arrivals=arrivals, num_barriers=1),
            "values_there": plgpu.Barrier(num_arrivals=self.values.before[0], num_barriers=1),
        }

    def run(self, q: Any, k: Any, v: Any, *rest: Any, **memory: Any) -> None:
        """Compute a tile of results. References: queries, keys and values as `tiles` say, what is read besides, and the
        results."""
        plgpu, dtype = backend(), self.out.view.dtype
        *besides, y = rest
        problem, heads = lax.axis_index(PROBLEM), prod(self.what.batch)
        at = At(
            div(problem, heads),
            unraveled(rem(problem, heads), self.what.batch),
            lax.axis_index(BLOCK) * GROUP,
            0 * problem,
        )
        self.fetch(at, (q, k, v), besides, memory)
        vectors = iter(memory["vectors"])
        sources = [next(vectors) if is_vector(x) else x[lane_of(x, at.lane)] for x in besides]
        plgpu.barrier_wait(memory["there"].at[0])
        through = self.images(GROUP, GROUP).rows(memory["through"], (0,), 0, GROUP) if self.interpreted else None
        scores = list(self.scores(sources, through, memory))
        valid = [inside(self.what.scores.n - start, (GROUP, count)) for start, count in self.spans]
        given = list(self.given(sources))
        found = self.what.rowwise(scores, given, valid, WgmmaTiles)
        weights = [only(own, tile) for own, tile in zip(valid, found, strict=True)]
        plgpu.barrier_wait(memory["values_there"].at[0])
        for i in range(self.values.before[0]):
            sums = self.weighted(weights, i, through, memory)
            self.results.rows(memory[self.left_in], (i,), 0, GROUP)[...] = self.what.finish(sums.astype(dtype))
        plgpu.commit_smem()
        for i in range(self.results.before[0]):
            for place, lies in self.results.copies(memory[self.left_in], (i,), 1):
                index = self.out.index(at.lane, at.batch, (at.row, GROUP), (i * GROUP, GROUP), place)
                plgpu.copy_smem_to_gmem(lies, y.at[index])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def fetch(self, at: At, arrays: Sequence[Any], besides: Sequence[Any], memory: dict[str, Any]) -> None:
        plgpu = backend()
        there = memory["there"].at[0]
        copies = [
            (self.queries, "queries", lambda part: ((at.row, GROUP), part), there),
            (self.keys, "keys", lambda part: (part, (at.begin, self.scored)), there),
            (self.values, "values", lambda part: ((at.begin, self.columns), part), memory["values_there"].at[0]),
        ]
        for tile, array, (images, name, spans, barrier) in zip(self.tiles, arrays, copies, strict=False):
            for i in range(images.before[0]):
                for place, lies in images.copies(memory[name], (i,), 1):
                    rows, columns = spans((i * GROUP, GROUP))
                    part = array.at[tile.index(at.lane, at.batch, rows, columns, place)]
                    plgpu.copy_gmem_to_smem(part, lies, barrier)
        for vector, to in zip(filter(is_vector, besides), memory["vectors"], strict=True):
            plgpu.copy_gmem_to_smem(vector.at[lane_of(vector, at.lane)], to, there)

    def scores(self, sources: Sequence[Any], through: Any, memory: dict[str, Any]) -> Iterator[Any]:
        """Of each span, in the dtype of the product."""
        plgpu, make = backend(), self.makes[0]
        left = [self.queries.rows(memory["queries"], (i,), 0, GROUP) for i in range(self.queries.before[0])]
        if make:
            own = self.read(sources, 0, (0, GROUP))
            dtype = self.what.scores.lhs.dtype
            left = [make([load(tile, plgpu.Layout.WGMMA), *own]).astype(dtype) for tile in left]
        times = partial(multiply, through=through) if make else plgpu.wgmma

        def product(acc: Any, span: tuple[int, int]) -> Any:
            for i, own in enumerate(left):
                times(acc, own, self.keys.rows(memory["keys"], (i,), *span).transpose((1, 0)))
            plgpu.wgmma_wait(0)
            return acc[...]

        for span in self.spans:
            acc = plgpu.ACC((GROUP, span[1]), jnp.float32)
            yield pl.run_scoped(partial(product, span=span), acc).astype(self.what.scores.out.dtype)

    def given(self, sources: Sequence[Any]) -> Iterator[list[Any]]:
        """What the rows' work reads, as tiles of each span."""
        for operand, make in enumerate(self.makes[3:], start=1):
            tiles = [self.read(sources, operand, span) for span in self.spans]
            made = [own[0] if make is None else make(own) for own in tiles]
            yield [WgmmaTiles.spread(x, (GROUP, columns)) for x, (_, columns) in zip(made, self.spans, strict=True)]

    def read(self, sources: Sequence[Any], operand: int, span: tuple[int, int]) -> list[Any]:
        """Tiles of what an operand is made of."""
        first = list(accumulate(map(len, self.besides), initial=0))[operand]
        places = self.besides[operand]
        return [over_rows(sources[first + i], place.array.dtype, span) for i, place in enumerate(places)]

    def weighted(self, weights: Sequence[Any], part: int, through: Any, memory: dict[str, Any]) -> Any:
        """GROUP numbers of each row's result."""
        plgpu = backend()

        def product(acc: Any) -> Any:
            for (start, _), own in zip(self.spans, weights, strict=True):
                right = self.values.rows(memory["values"], (part,), start, GROUP)
                multiply(acc, widened(own), right, through)
            plgpu.wgmma_wait(0)
            return acc[...]

        return pl.run_scoped(product, plgpu.ACC((GROUP, GROUP), jnp.float32))


@dataclass(frozen=True)
class At:
    """A head of a lane, its first row of queries, and zero: as a constant JAX lets it begin nothing that goes beyond an
    array's end."""

    lane: Any
    batch: Sequence[Any]
    row: Any
    begin: Any


def is_vector(x: Any) -> bool:
    return len(x.shape) == 2


def lane_of(x: Any, lane: Any) -> Any:
    return lane if x.shape[0] > 1 else 0


def extended(program: Program, arrays: Sequence[Any]) -> tuple[Program, list[Any]]:
    """With what is read and written beyond ends of arrays."""
    rows = padded(program.what.scores.m, GROUP)
    wanted = [(ROW, rows), (COLUMN, program.scored), (ROW, program.columns), (ROW, rows)]
    tiles, paddings = zip(*(tile.extended(*own) for tile, own in zip(program.tiles, wanted, strict=True)), strict=True)
    arrays = [jnp.pad(array, padding) for array, padding in zip(arrays, paddings, strict=False)]
    return replace(program, tiles=tiles), arrays
