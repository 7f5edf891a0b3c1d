"""Attention of 16 bits as one Mosaic GPU kernel: wgmma on what TMA has fetched, on an H100. See kernels/attention.py.

    grid (lanes x heads, blocks of rows)
    a program: warpgroups that take GROUP rows of queries each, and share the keys and values of a head

All of a program's copies are under way before it multiplies. Scores are rounded as they come, a GROUP of columns at a
time, so that whole rows of them stay in registers; from there they multiply the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from coalesce import jaxpr as J
from coalesce.kernels.attention import Attention, COLUMN, Dim, Operand, padded, Place, REDUCTIONS, ROW, SAME, unraveled
from coalesce.kernels.epilogue import on_tile
from coalesce.kernels.mosaic import backend, call, GROUP, Images, iota, load, multiply, relaid
from coalesce.kernels.triton import div, rem

DTYPES = ("bfloat16", "float16")
COLUMNS = 256  # of scores, at most: whole rows stay in registers
DEEP = 128  # numbers of a head, at most
TOGETHER = 8  # columns that a thread has some of
BARRIERS = 1024  # bytes
FLOAT = 4  # bytes of what a vector over columns is fetched as
PROBLEM, BLOCK = "problem", "block"  # the axes of a launch, besides "group", the warpgroup


def supports(what: Attention, operands: Sequence[Operand], out: Place) -> bool:
    """Whether it multiplies what lies somewhere as it is, by rows of whole GROUPs, and reads besides no more than
    vectors over columns."""
    q, k, v, *others = operands
    dtype = str(what.scores.lhs.dtype)
    tiles = [operand.places[0] for operand in (q, k, v) if operand.places]
    arrays = [place.array for place in tiles]
    if len(tiles) < 3 or dtype not in DTYPES or {str(x.dtype) for x in (*arrays, out.array)} != {dtype}:
        return False
    if what.scores.k % GROUP or what.d % GROUP or max(what.scores.k, what.d) > DEEP or what.scores.n > COLUMNS:
        return False
    if any(len(own.places) != 1 or own.make for own in (k, v)) or not all(map(is_number, q.places[1:])):
        return False
    # Of values a row of padding is multiplied by zero, so it has to be a number.
    rows_end = ends(v.places[0], ROW, what.scores.n)
    fetched = [(q.places[0], COLUMN), (k.places[0], ROW), (v.places[0], COLUMN), (out, COLUMN)]
    given = [place for operand in others for place in operand.places]
    return rows_end and all(in_rows(*one) for one in fetched) and all(map(over_columns, given))


def in_rows(place: Place, last: Dim) -> bool:
    """Whether what it counts `last` lies together, and all of it is an array's last dimension but for `starts`."""
    lies = [dim for dim, size in zip(place.dims, sizes_of(place), strict=True) if size > 1]
    whole = place.cut is None and place.slots is None
    return whole and len(lies) <= 4 and lies[-1:] == [last] and {ROW, COLUMN} <= set(lies)


def ends(place: Place, dim: Dim, count: int) -> bool:
    at = place.dims.index(dim)
    return (place.starts[at] if place.starts else 0) + count == sizes_of(place)[at]


def over_columns(place: Place) -> bool:
    """Whether it is a vector over columns, or a number."""
    return place.cut is None and place.slots is None and not any(place.starts) and set(place.dims) <= {COLUMN, None}


def is_number(place: Place) -> bool:
    return over_columns(place) and COLUMN not in place.dims


def sizes_of(place: Place) -> tuple[int, ...]:
    return tuple(place.array.shape[1:] if place.by_lane else place.array.shape)


@dataclass(frozen=True)
class Fetched:
    """How a tile of [lanes, *dims] is copied; its lanes are one if there is one array for all."""

    dims: tuple[Dim, ...]
    starts: tuple[int, ...]
    by_lane: bool

    def index(self, lane: Any, batch: Sequence[Any], rows: Any, columns: Any, first: Callable[[Any], Any]) -> Any:
        at: dict[Dim, tuple[Any, int]] = {ROW: rows, COLUMN: columns}
        own = [
            pl.ds(at[dim][0] + start, at[dim][1]) if dim in at else batch[dim] + start
            for dim, start in zip(self.dims, self.starts, strict=True)
            if isinstance(dim, int) or dim in at
        ]
        return (first(lane if self.by_lane else 0), *own)


def fetched(place: Place) -> tuple[jax.ShapeDtypeStruct, Fetched]:
    """What is copied, without the dimensions of size one, and how."""
    sizes, starts = sizes_of(place), place.starts or (0,) * len(place.dims)
    kept = [i for i, size in enumerate(sizes) if size > 1]
    lanes = place.array.shape[0] if place.by_lane else 1
    view = jax.ShapeDtypeStruct((lanes, *(sizes[i] for i in kept)), place.array.dtype)
    dims, starts = (tuple(own[i] for i in kept) for own in (place.dims, starts))
    return view, Fetched(dims, starts, place.by_lane)


@dataclass(frozen=True)
class Sizes:
    """Of a program."""

    m: int
    n: int
    k: int
    d: int
    groups: int

    @property
    def rows(self) -> int:
        return GROUP * self.groups

    @property
    def columns(self) -> int:
        """That are fetched."""
        return padded(self.n, GROUP)

    @property
    def scored(self) -> int:
        """That are computed."""
        return padded(self.n, TOGETHER)


def groups_of(m: int) -> int:
    return 2 if m > GROUP else 1


def run(what: Attention, operands: Sequence[Operand], out: Place, lanes: int, interpreted: bool = False) -> Any:
    """As `attention.run`."""
    sizes = Sizes(what.scores.m, what.scores.n, what.scores.k, what.d, groups_of(what.scores.m))
    views, (at_q, at_k, at_v) = zip(*(fetched(own.places[0]) for own in operands[:3]), strict=True)
    q, k, v = (own.places[0].array.reshape(view.shape) for own, view in zip(operands, views, strict=False))
    places = [*operands[0].places[1:], *(place for own in operands[3:] for place in own.places)]
    given = [in_floats(place, sizes.columns) for place in places]
    result = jax.ShapeDtypeStruct((lanes, *sizes_of(out)), out.array.dtype)
    view, at_out = fetched(Place(result, out.dims))
    dtype = jnp.dtype(result.dtype)
    blocks = pl.cdiv(sizes.m, sizes.rows)
    if interpreted:  # TMA gives zeros for what is beyond an array's end, and leaves it out
        whole = blocks * sizes.rows
        q, k, v = beyond(q, at_q, ROW, whole), beyond(k, at_k, COLUMN, sizes.scored), beyond(v, at_v, ROW, sizes.columns)
        shape = [whole if dim == ROW else size for dim, size in zip((None, *at_out.dims), view.shape, strict=True)]
        view = jax.ShapeDtypeStruct(shape, view.dtype)
    queries = Images((sizes.k // GROUP,), sizes.groups, GROUP, dtype, interpreted)
    keys = Images((sizes.k // GROUP,), 1, sizes.scored, dtype, interpreted)
    values = Images((sizes.d // GROUP,), 1, sizes.columns, dtype, interpreted)
    results = Images((sizes.d // GROUP,), sizes.groups, GROUP, dtype, interpreted)
    instead = "queries" if results == queries else "results"  # a warpgroup has read its queries by then

    def kernel(*refs: Any, **memory: Any) -> None:
        q, k, v, *rest, y = refs
        plgpu, problem = backend(), lax.axis_index(PROBLEM)
        heads = prod(what.batch)
        lane, batch = div(problem, heads), unraveled(rem(problem, heads), what.batch)
        group = lax.axis_index("group")
        begin = 0 * problem  # no constant: JAX lets none go beyond an array's end
        first = lax.axis_index(BLOCK) * sizes.rows + group * GROUP
        there, values_there = memory["there"].at[0], memory["values_there"].at[0]

        def copy(array: Any, at: Fetched, images: Images, ref: Any, tall: Any, rows: Any, columns: Any, to: Any) -> None:
            for i in range(images.before[0]):
                for place, lies in images.copies(ref, (i,), 1, tall):
                    own = [(a + i * GROUP, GROUP) if size is None else (a, size) for a, size in (rows, columns)]
                    plgpu.copy_gmem_to_smem(array.at[at.index(lane, batch, *own, place)], lies, to)

        copy(q, at_q, queries, memory["queries"], group, (first, GROUP), (0, None), there)

        @pl.when(group == 0)
        def _() -> None:
            copy(k, at_k, keys, memory["keys"], 0, (0, None), (begin, sizes.scored), there)
            for vector, to in zip(filter(is_vector, rest), memory["vectors"], strict=True):
                plgpu.copy_gmem_to_smem(vector.at[lane_of(vector, lane)], to, there)
            copy(v, at_v, values, memory["values"], 0, (begin, sizes.columns), (0, None), values_there)

        numbers = [None if is_vector(x) else x[lane_of(x, lane)] for x in rest]
        plgpu.barrier_wait(there)
        left = [queries.rows(memory["queries"], (i,), group * GROUP, GROUP) for i in range(queries.before[0])]
        vectors = iter(memory["vectors"])
        sources = [next(vectors) if x is None else x for x in numbers]

        def read(count: int, first: int, span: tuple[int, int]) -> list[Any]:
            found = zip(sources[first : first + count], places[first : first + count], strict=True)
            return [spread(x, place.array.dtype, span) for x, place in found]

        extra = len(operands[0].places) - 1
        through = None
        if interpreted:
            through = queries.rows(memory["through"], (0,), group * GROUP, GROUP)
        by_registers = partial(multiply, through=through)
        by_memory = by_registers if (make := operands[0].make) else plgpu.wgmma
        if make:
            own = read(extra, 0, (0, GROUP))
            left = [make([load(tile, plgpu.Layout.WGMMA), *own]).astype(dtype) for tile in left]

        def scores(start: int, count: int) -> Any:
            def product(acc: Any) -> Any:
                for i, own in enumerate(left):
                    by_memory(acc, own, keys.rows(memory["keys"], (i,), start, count).transpose((1, 0)))
                plgpu.wgmma_wait(0)
                return acc[...]

            return pl.run_scoped(product, plgpu.ACC((GROUP, count), jnp.float32)).astype(what.scores.out.dtype)

        spans = [(start, min(GROUP, sizes.scored - start)) for start in range(0, sizes.scored, GROUP)]
        tiles = [scores(*span) for span in spans]
        valid = [inside(sizes.n - start, tile.shape) for (start, _), tile in zip(spans, tiles, strict=True)]
        firsts = accumulate([len(own.places) for own in operands[3:]], initial=extra)
        others = [
            [made(own, read(len(own.places), first, span)) for span in spans]
            for own, first in zip(operands[3:], firsts, strict=False)
        ]
        weights = list(what.rowwise(tiles, others, valid, Rows))
        weights = [w if own is None else jnp.where(own, w, jnp.zeros_like(w)) for w, own in zip(weights, valid, strict=True)]
        plgpu.barrier_wait(values_there)
        for i in range(values.before[0]):

            def weighted(acc: Any, i: int = i) -> Any:
                for (start, _), own in zip(spans, weights, strict=True):
                    by_registers(acc, widened(own), values.rows(memory["values"], (i,), start, GROUP))
                plgpu.wgmma_wait(0)
                return acc[...]

            sums = pl.run_scoped(weighted, plgpu.ACC((GROUP, GROUP), jnp.float32))
            lies = results.rows(memory[instead], (i,), group * GROUP, GROUP)
            lies[...] = what.finish(sums.astype(dtype))
        plgpu.commit_smem()
        for i in range(values.before[0]):
            for place, lies in results.copies(memory[instead], (i,), 1, group):
                at = at_out.index(lane, batch, (first, GROUP), (i * GROUP, GROUP), place)
                plgpu.copy_smem_to_gmem(lies, y.at[at])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    plgpu = backend()
    memory = {
        "queries": queries.memory(),
        "keys": keys.memory(),
        "values": values.memory(),
        **({} if instead == "queries" else {"results": results.memory()}),
        **({"through": queries.memory()} if interpreted else {}),
        "vectors": [plgpu.SMEM((sizes.columns,), jnp.float32) for x in given if is_vector(x)],
        "there": plgpu.Barrier(
            num_arrivals=sizes.groups * queries.before[0] + keys.before[0] + sum(map(is_vector, given)), num_barriers=1
        ),
        "values_there": plgpu.Barrier(num_arrivals=values.before[0], num_barriers=1),
    }
    name = f"attention_{lanes * prod(what.batch)}x{sizes.m}x{sizes.n}x{sizes.k}"
    y = call(
        kernel,
        {PROBLEM: lanes * prod(what.batch), BLOCK: blocks},
        sizes.groups,
        view,
        (q, k, v, *given),
        memory,
        name=name,
        interpreted=interpreted,
    )
    if interpreted:
        y = lax.slice_in_dim(y, 0, sizes.m, axis=1 + at_out.dims.index(ROW))
    return y.reshape(result.shape)


def beyond(array: Any, at: Fetched, dim: Dim, count: int) -> Any:
    """With zeros, so that there are so many."""
    axis = at.dims.index(dim)
    missing = at.starts[axis] + count - array.shape[1 + axis]
    return jnp.pad(array, [(0, max(0, missing)) if i == 1 + axis else (0, 0) for i in range(array.ndim)])


def in_floats(place: Place, columns: int) -> Any:
    """[lanes or 1], or [lanes or 1, columns] with zeros beyond the columns that there are."""
    array = place.array.reshape(place.array.shape[0] if place.by_lane else 1, -1).astype(jnp.float32)
    return array[:, 0] if is_number(place) else jnp.pad(array, ((0, 0), (0, columns - array.shape[1])))


def is_vector(x: Any) -> bool:
    return len(x.shape) == 2


def lane_of(x: Any, lane: Any) -> Any:
    return lane if x.shape[0] > 1 else 0


def spread(x: Any, dtype: Any, span: tuple[int, int]) -> Any:
    """A tile of a number, or of what lies in shared memory over its columns: where they begin, and how many."""
    shape = (GROUP, span[1])
    if jnp.ndim(x) == 0:
        return lax.broadcast_in_dim(x.astype(dtype), shape, ())
    vector = load(x.at[pl.ds(*span)], backend().Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(vector.astype(dtype), shape, (1,))


def inside(columns: int, shape: Sequence[int]) -> Any:
    """Which columns of a tile are among so many; None: all."""
    return iota(shape, 1) < columns if columns < shape[1] else None


def widened(tile: Any) -> Any:
    """As wide as what wgmma takes out of registers, with zeros."""
    missing = GROUP - tile.shape[1]
    if not missing:
        return tile
    return lax.concatenate([tile, relaid(jnp.zeros((GROUP, missing), tile.dtype), backend().Layout.WGMMA)], 1)


def made(operand: Operand, tiles: Sequence[Any]) -> Any:
    return tiles[0] if operand.make is None else operand.make(tiles)


class Rows:
    """The rows' work on tiles that lie as wgmma leaves them; what is one number for each row is [m]."""

    @staticmethod
    def on(eqn: J.Eqn, args: Sequence[Any]) -> Any:
        name, dtype = eqn.primitive.name, J.dtype(eqn.outvars[0])
        if name in SAME:
            return args[0]
        shape = max(map(jnp.shape, args), key=len)
        if name == "div" and str(dtype) in DTYPES and len(shape) == 2 and jnp.ndim(args[1]) == 1:
            # one division a row; what that rounds is less than what the dtype does
            times = Rows.spread(1.0 / args[1].astype(jnp.float32), shape)
            return (args[0].astype(jnp.float32) * times).astype(dtype)
        return on_tile(eqn, [Rows.spread(x, shape) for x in args])

    @staticmethod
    def spread(x: Any, shape: Sequence[int]) -> Any:
        return x if jnp.shape(x) == tuple(shape) else lax.broadcast_in_dim(x, shape, range(jnp.ndim(x)))

    @staticmethod
    def reduced(eqn: J.Eqn, tiles: Sequence[Any], valid: Sequence[Any]) -> Any:
        name = eqn.primitive.name
        over, two = OVER[name]
        wide = [x.astype(jnp.float32) for x in tiles]
        rest = REDUCTIONS[name]
        wide = [x if own is None else jnp.where(own, x, jnp.full_like(x, rest)) for x, own in zip(wide, valid, strict=True)]
        return reduce(two, [over(x, axis=1) for x in wide]).astype(J.dtype(eqn.outvars[0]))


# Along rows, and of two such.
OVER = {"reduce_sum": (jnp.sum, jnp.add), "reduce_max": (jnp.max, jnp.maximum), "reduce_min": (jnp.min, jnp.minimum)}
