"""A loop that some lanes run to its end before others begin: see `passes/run_in_shifts.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from coalesce import jaxpr as J
from coalesce.bundle import Bundle, Item, JointStep, Loop, Pack, packs
from coalesce.lanes import Banked, Env, LaneValue, plain, Shared, Stacked
from coalesce.lower_control import lower_loop, Walk as Runs
from coalesce.reschedule import map_bodies, map_schedule
from coalesce.slab import Picked


@runtime_checkable
class Walk(Runs, Protocol):
    bundle: Bundle
    arrays: Sequence[Any]

    def of(self, bundle: Bundle, arrays: Sequence[Any], /) -> Walk: ...


def lower_in_shifts(walk: Walk, loop: Loop, env: Env) -> list[LaneValue]:
    """The results of a scan for all lanes. Each shift waits for the one before it."""
    read = {a: env[loop.family, a] for a in loop.eqn.invars if not isinstance(a, J.Literal) and (loop.family, a) in env}
    done: list[list[LaneValue]] = []
    for start, end in spans(walk.width(loop.family), loop.shifts):
        own: dict[J.Atom, LaneValue] = {atom: part_of(value, start, end) for atom, value in read.items()}
        given = after(done[-1], loop, own) if done else own
        shift = shift_of(walk, loop, start, end)
        done.append(lower_loop(shift, of_width(loop, end - start), {(loop.family, a): x for a, x in given.items()}))
    return [in_one(column) for column in zip(*done, strict=True)]


def spans(lanes: int, shifts: int) -> Iterator[tuple[int, int]]:
    """The first lane of each shift, and of the next one."""
    return pairwise(lanes * i // shifts for i in range(shifts + 1))


def shift_of(walk: Walk, loop: Loop, start: int, end: int) -> Walk:
    """The walk as some lanes see it: with no other rows of what each lane has a row of."""
    family, bundle, arrays = walk.bundle.families[loop.family], walk.bundle, list(walk.arrays)
    for pack in packs(loop.bodies[0]):
        own = [member for member in pack.members if member.weight is not None and family.is_own(member.weight)]
        assert len(pack.members) == 1 or not own, f"{pack.name}: rows of several members are not those of lanes"
        if pack.array is not None and own:
            arrays[pack.array] = rows_of(walk.arrays[pack.array], start, end)
    each = [family.is_own(w) for w in range(family.n_weights)]
    part = replace(
        family,
        lanes=family.lanes[start:end],
        rows=tuple(tuple(range(end - start)) if o else r[start:end] for r, o in zip(family.rows, each, strict=True)),
        owners=tuple(r[start:end] if o else r for r, o in zip(family.owners, each, strict=True)),
    )
    families = tuple(part if other is family else other for other in bundle.families)
    return walk.of(replace(bundle, families=families), arrays)


def of_width(loop: Loop, lanes: int) -> Loop:
    """The loop for so many lanes, at once."""

    def change(item: Pack | JointStep) -> Item:
        assert isinstance(item, Pack), "a loop of one family has no joint steps"
        return replace(item, members=tuple(replace(member, width=lanes) for member in item.members))

    found = map_bodies(loop, lambda body: map_schedule(body, change))
    assert isinstance(found, Loop)
    return replace(found, shifts=1)


def part_of(value: LaneValue, start: int, end: int) -> LaneValue:
    """What some lanes have of a value."""
    if isinstance(value, Banked):
        if len(set(value.rows)) == 1:
            return Banked(value.array, value.rows[start:end])
        return Banked(rows_of(value.array, start, end), tuple(range(end - start)))
    own = plain(value)
    if isinstance(own, Shared):
        return own
    origin = own.origin and replace(own.origin, whole=own.origin.whole[start:end])
    return Stacked(own.value[start:end], origin, None if own.tf32 is None else own.tf32[start:end])


def rows_of(array: Any, start: int, end: int) -> Picked:
    """Rows of an array, or of what is picked of one, where they lie."""
    if isinstance(array, Picked):
        return Picked(array.array, array.slots[start:end])
    return Picked(array, jnp.arange(start, end, dtype=jnp.int32))


def after(before: Sequence[LaneValue], loop: Loop, given: Mapping[J.Atom, LaneValue]) -> dict[J.Atom, LaneValue]:
    """What is given, of which the loop begins with nothing before all that stands before it is computed."""
    values = {atom: x for atom, x in given.items() if isinstance(x, Shared | Stacked)}
    carry = {atom: x for atom, x in values.items() if any(atom is other for other in J.as_scan(loop.eqn).init)}
    arrays = [x.value for x in before if isinstance(x, Shared | Stacked)]
    waits = carry or values
    held = behind([x.value for x in waits.values()], arrays)
    return {**given, **{atom: replace(x, value=y) for (atom, x), y in zip(waits.items(), held, strict=True)}}


@jax.custom_jvp
def behind(values: Sequence[Any], before: Sequence[Any]) -> Sequence[Any]:
    """Values that are there when others are. JAX's own rule for the barrier would tie their tangents to the others'."""
    held, _ = lax.optimization_barrier((list(values), list(before)))
    return held


@behind.defjvp
def behind_jvp(primals: Any, tangents: Any) -> Any:
    return behind(*primals), tangents[0]


def in_one(column: Sequence[LaneValue]) -> LaneValue:
    """The lanes of all shifts."""
    first = column[0]
    if isinstance(first, Shared):
        return first
    return Stacked(jnp.concatenate([x.value for x in column if isinstance(x, Stacked)]))
