"""Which dimension of a value counts what, in work on rows: for the pass that finds it and for who lowers it.

Rows are those of one shape [*rows, n]. A value has that shape, or size one in some of its dimensions; or it has a
number for each row, [*rows], or it is one number.
"""

from __future__ import annotations

from collections.abc import Sequence

from coalesce import jaxpr as J
from coalesce.bundle import Step
from coalesce.kernels.attention import COLUMN, Dim, REDUCTIONS


def rows_of(steps: Sequence[Step]) -> tuple[int, ...]:
    """The shape of all rows: of what the first reduction reads."""
    return next(J.shape(step.eqn.invars[0]) for step in steps if step.eqn.primitive.name in REDUCTIONS)


def dims_of(shape: Sequence[int], rows: Sequence[int]) -> tuple[Dim, ...] | None:
    """For each dimension which one of the rows it counts, or COLUMN; None for size one. None if it is no such value."""
    if len(shape) not in (0, len(rows) - 1, len(rows)):
        return None
    if any(size not in (1, whole) for size, whole in zip(shape, rows, strict=False)):
        return None
    last = len(rows) - 1
    return tuple(None if size == 1 else COLUMN if at == last else at for at, size in enumerate(shape))


def keeps_dims(eqn: J.Eqn, rows: Sequence[int]) -> bool:
    """Whether an equation that changes nothing but the shape leaves what each dimension counts."""
    source, *rest = eqn.invars
    before, after = dims_of(J.shape(source), rows), dims_of(J.shape(eqn.outvars[0]), rows)
    if rest or before is None or after is None:
        return False
    if eqn.primitive.name != "broadcast_in_dim":
        return [d for d in before if d is not None] == [d for d in after if d is not None]
    return spread(eqn, after) == before


def spread(eqn: J.Eqn, dims: Sequence[Dim]) -> tuple[Dim, ...]:
    """What the dimensions of a broadcast's operand count, from those of its result."""
    at = zip(eqn.params["broadcast_dimensions"], J.shape(eqn.invars[0]), strict=True)
    return tuple(None if size == 1 else dims[i] for i, size in at)


def takes_rows(eqn: J.Eqn) -> bool:
    """Whether an equation leaves some rows out, and keeps the others whole and in their order."""
    if eqn.primitive.name != "slice" or not set(eqn.params["strides"] or (1,)) == {1}:
        return False
    return J.shape(eqn.invars[0])[-1] == J.shape(eqn.outvars[0])[-1]


def taken(steps: Sequence[Step]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(where the rows that are left begin in each dimension, how many there are)."""
    last = steps[-1].eqn
    if takes_rows(last):
        return tuple(last.params["start_indices"][:-1]), J.shape(last.outvars[0])[:-1]
    sizes = rows_of(steps)[:-1]
    return (0,) * len(sizes), sizes
