"""Values during lowering, seen by all lanes of a family at once.

    Shared    one value for all lanes; the only kind in a family of one lane
    Stacked   one value a lane, on a leading axis
    Banked    an array of weights, and the row of it that each lane reads
    Part      one member's lanes of a `Joint`, the padded stack that a pack of several members leaves behind

L lanes; shapes without it are one lane's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from coalesce import jaxpr as J, pool
from coalesce.kernels.strips import edges
from coalesce.layout import pad_to
from coalesce.slab import whole


@dataclass(frozen=True)
class Origin:
    """Where a value was cut out, for a kernel that rather reads it there."""

    whole: Any  # [steps, .., columns], or [.., columns]; of a value for each lane, behind the lane axis
    start: int = 0  # the first of its columns
    at: Any = None  # the step that it is, int32; None if it is of all


@dataclass(frozen=True)
class Shared:
    value: Any
    origin: Origin | None = None
    tf32: Any = None  # the same rounded to TF32, where that was written too


@dataclass(frozen=True)
class Stacked:
    value: Any  # [L, ...]
    origin: Origin | None = None
    tf32: Any = None


@dataclass(frozen=True)
class Banked:
    array: Any  # [rows, ...], or a cut of a slab
    rows: tuple[int, ...]  # for each lane


@dataclass(frozen=True, eq=False)
class Joint:
    """The lanes of several members, one after another, each value padded at its end to one shape."""

    value: Any  # [L, *padded]
    lanes: tuple[int, ...]  # of each part
    shapes: tuple[tuple[int, ...], ...]  # of each part's own values
    zeros: bool = False  # whether all padding is zero; else it is whatever was computed there

    @property
    def padded(self) -> tuple[int, ...]:
        return self.value.shape[1:]

    def sizes(self, dim: int) -> np.ndarray:
        """Each lane's own size in a dimension of its values, int32 [L]."""
        return np.repeat(np.asarray([shape[dim] for shape in self.shapes], np.int32), self.lanes)

    def parts(self) -> list[Part]:
        return [Part(self, i) for i in range(len(self.lanes))]


@dataclass(frozen=True, eq=False)
class Part:
    joint: Joint
    index: int

    @property
    def value(self) -> Any:
        """[L, ...] of this part's lanes, without the padding."""
        joint, i = self.joint, self.index
        start = sum(joint.lanes[:i])
        own = (joint.lanes[i], *joint.shapes[i])
        at = (start, *(0 for _ in joint.shapes[i]))
        return lax.slice(joint.value, at, [a + n for a, n in zip(at, own, strict=True)])


@dataclass(frozen=True)
class InPacks:
    """A weight that packs alone read, each out of its own array: it has no value in the walk."""


LaneValue = Shared | Stacked | Banked | Part
Env = dict[tuple[int, Any], LaneValue]  # (family, variable) -> its value, in one scope


def plain(value: LaneValue) -> Shared | Stacked:
    """A value by itself: a weight out of its bank, a part out of its stack. No copy of a weight if each lane reads its
    own row, or all read one."""
    if isinstance(value, Part):
        return Shared(value.value[0]) if value.joint.lanes[value.index] == 1 else Stacked(value.value)
    if not isinstance(value, Banked):
        return value
    array = whole(value.array)
    if len(set(value.rows)) == 1:
        return Shared(array[value.rows[0]] if array.shape[0] > 1 else array.reshape(array.shape[1:]))
    return Stacked(take(array, value.rows))


def in_tf32(value: LaneValue | None) -> LaneValue | None:
    """A value as who multiplies it in TF32 reads it: what was rounded where it was written."""
    if not isinstance(value, Shared | Stacked) or value.tf32 is None:
        return value
    return replace(value, value=value.tf32, tf32=None)


def take(x: Any, order: Sequence[int]) -> Any:
    """`x[order]` along the leading axis; `x` itself where that is the identity."""
    if tuple(order) == tuple(range(x.shape[0])):
        return x
    return x[np.asarray(order, np.int32)]


def stacked(value: LaneValue, lanes: int) -> Any:
    """The [L, ...] array of a value."""
    value = plain(value)
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
            return whole(array)[rows[index]]
        case Part():
            return value.value[index]


def from_lanes(values: Sequence[Any]) -> Shared | Stacked:
    """One value a lane, stacked; shared if there is one lane."""
    return Shared(values[0]) if len(values) == 1 else Stacked(jnp.stack(values))


def apply(eqn: J.Eqn, args: Sequence[LaneValue]) -> list[LaneValue]:
    """An equation for all lanes at once, by its own batching rule."""
    values = [plain(a) for a in args]
    origin = origin_of(eqn, values)
    if not any(isinstance(v, Stacked) for v in values):
        return [Shared(out, origin) for out in one(eqn, [v.value for v in values])]
    axes = tuple(0 if isinstance(v, Stacked) else None for v in values)
    outs = jax.vmap(lambda *xs: one(eqn, xs), in_axes=axes)(*(v.value for v in values))
    return [Stacked(out, origin) for out in outs]


def origin_of(eqn: J.Eqn, values: Sequence[Shared | Stacked]) -> Origin | None:
    """Where the result of an equation lies that cuts out columns."""
    cut = edges(eqn) if eqn.primitive.name == "slice" else None
    if cut is None:
        return None
    (value,) = values
    before = value.origin or Origin(value.value)
    return replace(before, start=before.start + cut[0])


def one(eqn: J.Eqn, args: Sequence[Any]) -> list[Any]:
    """A lane's results."""
    return [pool.as_written(eqn)(args[0])] if pool.supports(eqn) else J.bind(eqn, args)


def apply_each(eqn: J.Eqn, args: Sequence[LaneValue], lanes: int) -> list[LaneValue]:
    """An equation lane by lane."""
    results = [J.bind(eqn, [lane(a, i) for a in args]) for i in range(lanes)]
    return [from_lanes(list(column)) for column in zip(*results, strict=True)]


def join(values: Sequence[LaneValue], lanes: Sequence[int], padded: tuple[int, ...]) -> Joint:
    """Values of several members as one stack, padded with zeros to `padded`; as it is if it is one already."""
    first = values[0]
    if isinstance(first, Part) and first.joint.padded == padded and len(first.joint.lanes) == len(values):
        if all(isinstance(v, Part) and v.joint is first.joint and v.index == i for i, v in enumerate(values)):
            return first.joint
    rows = [stacked(value, n) for value, n in zip(values, lanes, strict=True)]
    stack = jnp.concatenate([pad_to(x, (x.shape[0], *padded)) for x in rows])
    return Joint(stack, tuple(lanes), tuple(x.shape[1:] for x in rows), zeros=True)


def masked(joint: Joint, dims: Sequence[int], fill: Any = 0) -> Joint:
    """The stack with `fill` in the padding of some dimensions of its values, which a contraction or reduction reads."""
    if joint.zeros and fill == 0:
        return joint
    x, mask = joint.value, None
    for dim in dims:
        if all(shape[dim] == joint.padded[dim] for shape in joint.shapes):
            continue
        at = lax.broadcasted_iota(np.int32, x.shape, dim + 1)
        own = at < lax.broadcast_in_dim(joint.sizes(dim), x.shape, (0,))
        mask = own if mask is None else mask & own
    if mask is None:
        return joint
    filled = lax.select(mask, x, lax.full_like(x, fill))
    return Joint(filled, joint.lanes, joint.shapes)
