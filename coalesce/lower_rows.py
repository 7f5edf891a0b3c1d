"""Work on rows as one kernel. What it reads is read where it lies: weights by slot, and what a move made of a value out
of that value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from coalesce import jaxpr as J
from coalesce.bundle import Rowwise
from coalesce.kernels import rows
from coalesce.kernels.attention import Dim, Place, REDUCTIONS, ROW, Tiles
from coalesce.lanes import Banked, Env, LaneValue, plain, Shared, Stacked
from coalesce.lower_attention import as_read, in_bank, Made
from coalesce.rowwise import dims_of, rows_of, spread, taken, takes_rows
from coalesce.tf32 import nearest

Left = Sequence[tuple[Any, bool]]  # a variable, and whether its numbers are rounded to TF32


@runtime_checkable
class Walk(Protocol):
    made: Made

    def width(self, family: int) -> int: ...
    def read(self, env: Env, family: int, atom: J.Atom) -> LaneValue: ...


def lower_rows(walk: Walk, item: Rowwise, env: Env) -> dict[tuple[int, Any], LaneValue]:
    """What it leaves."""
    f, shape, reads = item.inside[0].family, rows_of(item.inside), reads_of(item)
    begin, sizes = taken(item.inside)
    places = [
        by_rows(behind(place, begin), own, sizes)
        for place, own in (place_of(walk, env, f, atom, shape) for atom in reads)
    ]
    lanes = walk.width(f) if any(place.by_lane for place in places) else 1
    left = [(v, False) for v in item.results] + [(v, True) for v in item.rounded]
    outs = [left_as(v, (*sizes, shape[-1]), lanes) for v, _ in left]
    what = rows.Rows(sizes, shape[-1], partial(work, item, reads, left))

    def run(arrays: Sequence[Sequence[Any]]) -> Any:
        given = [with_arrays(place, found) for place, found in zip(places, arrays, strict=True)]
        return rows.run(what, given, outs, lanes)

    run.__name__ = run.__qualname__ = "rows"
    with J.context_of(item.inside[-1].eqn), jax.named_scope("rows"):
        arrays = jax.jit(run)([place.arrays for place in places])
    found = dict(zip(left, arrays, strict=True))
    return {(f, v): value_of(v, found, lanes) for v, _ in left}


def reads_of(item: Rowwise) -> list[J.Var]:
    """What it reads, each once."""
    inside = {v for step in item.inside for v in step.eqn.outvars}
    read = [a for step in item.inside for a in step.eqn.invars if not isinstance(a, J.Literal)]
    return list(dict.fromkeys(a for a in read if a not in inside))


def work(item: Rowwise, reads: Sequence[J.Var], left: Left, *tiles: Any, valid: Any, columns: int) -> list[Any]:
    """The results, from tiles of what it reads."""
    known = {atom: as_read(tile, atom) for atom, tile in zip(reads, tiles, strict=True)}
    for step in item.inside:
        args = [J.literal_value(a) if isinstance(a, J.Literal) else known[a] for a in step.eqn.invars]
        if step.eqn.primitive.name in REDUCTIONS:  # a number may stand for all of its row
            whole = jnp.broadcast_to(args[0], (jnp.shape(args[0])[0], columns))
            known[step.eqn.outvars[0]] = Tiles.reduced(step.eqn, [whole], [valid])
        else:
            known[step.eqn.outvars[0]] = args[0] if takes_rows(step.eqn) else Tiles.on(step.eqn, args)
    return [nearest(known[v]) if rounds else known[v] for v, rounds in left]


# ---- what it reads ---------------------------------------------------------------------------------------------------


def place_of(walk: Walk, env: Env, family: int, atom: J.Atom, shape: tuple[int, ...]) -> tuple[Place, tuple[int, ...]]:
    """Where a value lies, and in which shape."""
    dims = dims_of(J.shape(atom), shape)
    assert dims is not None, f"rows {shape} read {atom}, which is of none of their shapes"
    source, own, starts = moved_from(walk, env, family, atom, dims)
    value, lanes = walk.read(env, family, source), walk.width(family)
    if isinstance(value, Banked) and J.dtype(source) != "bool":
        return picked(in_bank(value.array, own, starts), value.rows, lanes), J.shape(source)
    value = plain(value)
    array = jnp.asarray(value.value)
    array = array.astype(jnp.int8) if array.dtype == bool else array  # kernels load no truth values
    if array.shape == ():
        return Place(array.reshape(1), (None,), False, (0,)), (1,)
    return Place(array, own, isinstance(value, Stacked), starts), J.shape(source)


def moved_from(
    walk: Walk, env: Env, family: int, atom: J.Atom, dims: tuple[Dim, ...]
) -> tuple[J.Atom, tuple[Dim, ...], tuple[int, ...]]:
    """What a value was cut out of or repeated from; what the dimensions of that count, and where in it to begin."""
    starts = (0,) * len(dims)
    while not isinstance(atom, J.Literal) and (eqn := walk.made.get((family, atom))) is not None:
        source, *rest = eqn.invars
        if rest or not (isinstance(source, J.Literal) or (family, source) in env):
            break
        if eqn.primitive.name == "broadcast_in_dim":
            own = zip(eqn.params["broadcast_dimensions"], J.shape(source), strict=True)
            starts = tuple(0 if size == 1 else starts[i] for i, size in own)
            dims = spread(eqn, dims)
        elif eqn.primitive.name == "slice" and set(eqn.params["strides"] or (1,)) == {1}:
            starts = tuple(a + b for a, b in zip(starts, eqn.params["start_indices"], strict=True))
        else:
            break
        atom = source
    return atom, dims, starts


def picked(place: Place, own: Sequence[int], lanes: int) -> Place:
    """Where each lane reads a row of its own choice."""
    if tuple(own) == tuple(range(lanes)):
        return place
    order = np.asarray(own, np.int32)
    return replace(place, slots=jnp.asarray(order) if place.slots is None else place.slots[order])


def behind(place: Place, begin: Sequence[int]) -> Place:
    """Of rows that begin somewhere in each dimension."""
    each = zip(place.starts, place.dims, strict=True)
    return replace(place, starts=tuple(start + (begin[dim] if isinstance(dim, int) else 0) for start, dim in each))


def by_rows(place: Place, own: tuple[int, ...], sizes: tuple[int, ...]) -> Place:
    """With the rows in one dimension, as they are numbered, where a value has all of them."""
    count = len(sizes)
    has_all = own[:count] == sizes and not any(place.starts[:count])
    counts = all(size == 1 or dim == at for at, (size, dim) in enumerate(zip(sizes, place.dims, strict=False)))
    if not (has_all and counts) or count < 2:
        return place
    dims, starts, rest = (ROW, *place.dims[count:]), (0, *place.starts[count:]), own[count:]
    if place.cut:
        return replace(place, dims=dims, starts=starts, cut=(place.cut[0], (prod(sizes), *rest)))
    before = place.array.shape[: place.by_lane]
    return replace(place, array=place.array.reshape(*before, prod(sizes), *rest), dims=dims, starts=starts)


def with_arrays(place: Place, arrays: Sequence[Any]) -> Place:
    array, *slots = arrays
    return replace(place, array=array, slots=slots[0] if slots else None)


# ---- what it leaves --------------------------------------------------------------------------------------------------


def left_as(var: J.Var, shape: tuple[int, ...], lanes: int) -> jax.ShapeDtypeStruct:
    *sizes, n = shape
    whole = J.shape(var) == shape
    return jax.ShapeDtypeStruct((lanes, prod(sizes), n) if whole else (lanes, prod(sizes)), J.dtype(var))


def value_of(var: J.Var, found: Mapping[tuple[Any, bool], Any], lanes: int) -> LaneValue:
    """A result as it is, with itself in TF32 if that was written too; or in TF32 alone."""
    own = J.shape(var)
    exact, rounded = (
        None if array is None else array.reshape((lanes, *own) if lanes > 1 else own)
        for array in (found.get((var, False)), found.get((var, True)))
    )
    kind = Stacked if lanes > 1 else Shared
    return kind(rounded) if exact is None else kind(exact, tf32=rounded)
