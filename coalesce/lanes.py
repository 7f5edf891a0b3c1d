"""Values during lowering, seen by all lanes of a family at once.

    Shared    one value for all lanes; the only kind in a family of one lane
    Stacked   one value a lane, on a leading axis
    Banked    an array of weights, and the row of it that each lane reads

L lanes; shapes without it are one lane's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coalesce import jaxpr as J


@dataclass(frozen=True)
class Shared:
    value: Any


@dataclass(frozen=True)
class Stacked:
    value: Any  # [L, ...]


@dataclass(frozen=True)
class Banked:
    array: Any  # [rows, ...]
    rows: tuple[int, ...]  # for each lane


LaneValue = Shared | Stacked | Banked
Env = dict[tuple[int, Any], LaneValue]  # (family, variable) -> its value, in one scope


def read_bank(value: LaneValue) -> Shared | Stacked:
    """A banked weight as a value; no copy if each lane reads its own row, or all read one."""
    if not isinstance(value, Banked):
        return value
    if len(set(value.rows)) == 1:
        return Shared(
            value.array[value.rows[0]] if value.array.shape[0] > 1 else value.array.reshape(value.array.shape[1:])
        )
    return Stacked(take(value.array, value.rows))


def take(x: Any, order: Sequence[int]) -> Any:
    """`x[order]` along the leading axis; `x` itself where that is the identity."""
    if tuple(order) == tuple(range(x.shape[0])):
        return x
    return x[np.asarray(order, np.int32)]


def stacked(value: LaneValue, lanes: int) -> Any:
    """The [L, ...] array of a value."""
    value = read_bank(value)
    if isinstance(value, Stacked):
        return value.value
    return jnp.broadcast_to(value.value, (lanes, *jnp.shape(value.value)))


def lane(value: LaneValue, index: int) -> Any:
    """One lane's own value."""
    match value:
        case Shared(x):
            return x
        case Stacked(x):
            return x[index]
        case Banked(array, rows):
            return array[rows[index]]


def from_lanes(values: Sequence[Any]) -> Shared | Stacked:
    """One value a lane, stacked; shared if there is one lane."""
    return Shared(values[0]) if len(values) == 1 else Stacked(jnp.stack(values))


def apply(eqn: J.Eqn, args: Sequence[LaneValue]) -> list[LaneValue]:
    """An equation for all lanes at once, by its own batching rule."""
    values = [read_bank(a) for a in args]
    if not any(isinstance(v, Stacked) for v in values):
        return [Shared(out) for out in J.bind(eqn, [v.value for v in values])]
    axes = tuple(0 if isinstance(v, Stacked) else None for v in values)
    outs = jax.vmap(lambda *xs: J.bind(eqn, xs), in_axes=axes)(*(v.value for v in values))
    return [Stacked(out) for out in outs]


def apply_each(eqn: J.Eqn, args: Sequence[LaneValue], lanes: int) -> list[LaneValue]:
    """An equation lane by lane."""
    results = [J.bind(eqn, [lane(a, i) for a in args]) for i in range(lanes)]
    return [from_lanes(list(column)) for column in zip(*results, strict=True)]
