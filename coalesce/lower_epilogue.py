"""A pack's epilogue as its kernel runs it, on tiles, and what it reads as its kernel takes it.

L lanes of a member; G problems with a right operand of their own, R lanes on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import jax.numpy as jnp

from coalesce import jaxpr as J
from coalesce.bundle import Pack
from coalesce.epilogues import epilogue_reads
from coalesce.heavy import HeavyOp
from coalesce.kernels import TAKES_APART
from coalesce.kernels.epilogue import COLUMN, End, Epilogue, WHOLE
from coalesce.kernels.strips import columns_of, has_rows, is_number, on_strips, strip_width
from coalesce.lanes import Banked, LaneValue, Origin, plain, Shared, Stacked, take
from coalesce.member import Fold
from coalesce.slab import Cut, Picked, Turn
from coalesce.tf32 import nearest


def epilogue_of(pack: Pack) -> Epilogue | None:
    """The pack's epilogue on tiles: its steps are elementwise, or take strips of columns apart, and a broadcast is its
    operand's tile already."""
    if not pack.epilogue:
        return Epilogue(nearest, (), pack.op.out.dtype) if pack.rounds else None
    op, product, reads = pack.op, pack.members[0].eqn.outvars[0], epilogue_reads(pack)
    width = strip_width(op, [step.eqn for step in pack.epilogue])
    counts = {v: columns_of(op, J.shape(v)) // width for v in (product, *pack.results)}
    counts |= {v: 1 if is_number(J.shape(v)) else columns_of(op, J.shape(v)) // width for v in reads}

    def apply(*tiles: Any) -> Any:
        rest = iter(tiles)
        env = {v: [next(rest) for _ in range(counts[v])] for v in (product, *reads)}
        for step in pack.epilogue:
            args = [[J.literal_value(a)] if isinstance(a, J.Literal) else env[a] for a in step.eqn.invars]
            if step.eqn.primitive.name != "broadcast_in_dim":
                outs = on_strips(step.eqn, args, width)
            else:
                count = columns_of(op, J.shape(step.eqn.outvars[0])) // width
                outs = [repeated(step.eqn, args[0], jnp.shape(tiles[0]), count)]
            env.update(zip(step.eqn.outvars, outs, strict=True))
        left = [tile for v in pack.results for tile in env[v]]
        left = [nearest(tile) for tile in left] if pack.rounds else left
        return left[0] if plain else left

    kinds = tuple(WHOLE if has_rows(op, J.shape(a)) else COLUMN for a in reads)
    parts, ends = op.n // width, tuple(End(J.dtype(v), counts[v]) for v in pack.results)
    plain = parts == 1 and len(ends) == 1
    return Epilogue(apply, kinds, ends[0].dtype, parts, tuple(counts[v] for v in reads), () if plain else ends)


def repeated(eqn: J.Eqn, strips: Sequence[Any], tile: Sequence[int], count: int) -> list[Any]:
    """The strips of a broadcast: a vector's own, or a number's over again."""
    if isinstance(eqn.invars[0], J.Literal):
        strips = [jnp.full(tile, strips[0], J.dtype(eqn.outvars[0]))]
    return list(strips) if len(strips) == count else list(strips) * count


def given_to(pack: Pack, how: Fold, values: Sequence[LaneValue | None]) -> list[Any]:
    """What an epilogue reads, as its kernel takes it."""
    op, width, step = pack.op, strip_width(pack.op, [step.eqn for step in pack.epilogue]), None
    found: list[Any] = []
    for value, atom in zip(values, epilogue_reads(pack), strict=True):
        shape = J.shape(atom)
        if value is None:
            found.append(None)
            continue
        turn = turn_of(value, how, pack, step) if not is_number(shape) else None
        step = turn.at if turn else step
        if turn or has_rows(op, shape):
            found.append(turn or by_place(value, how))
        else:
            found.append(column_of(value, width if is_number(shape) else columns_of(op, shape), how, op))
    return found


def turn_of(value: LaneValue, how: Fold, pack: Pack, step: Any) -> Turn | None:
    """What a step of a loop reads, where it lies, if the kernel can read it there; `step` is the one that it reads of
    others, if there are any."""
    if not isinstance(value, Shared | Stacked) or value.origin is None:
        return None
    origin = value.origin
    if origin.at is None or (step is not None and origin.at is not step) or not origin.whole.size:
        return None
    if pack.kernel not in TAKES_APART or pack.launch is not None or pack.op.batch > 1:
        return None
    if not in_one_piece(value, origin):
        return None
    lanes = range(how.groups) if isinstance(value, Stacked) else [0]
    if [lane for group in how.order for lane in group] != list(lanes):
        return None
    return Turn(origin.whole if isinstance(value, Stacked) else origin.whole[None], origin.at, origin.start)


def in_one_piece(value: Shared | Stacked, origin: Origin) -> bool:
    """Whether a value's elements lie one after the other where it was cut out: it is one row, or has all columns."""
    *rows, columns = jnp.shape(value.value)[isinstance(value, Stacked) :]
    return prod(rows) == 1 or columns == jnp.shape(origin.whole)[-1]


def by_place(value: LaneValue | None, how: Fold) -> Any:
    """A value of each lane as [G, R, ...]."""
    if value is None:
        return None
    value = plain(value)
    if isinstance(value, Shared):
        return jnp.broadcast_to(value.value, (how.groups, how.per_group, *jnp.shape(value.value)))
    x = take(value.value, [i for group in how.order for i in group])
    return x.reshape(how.groups, how.per_group, *x.shape[1:])


def column_of(value: LaneValue, columns: int, how: Fold, op: HeavyOp) -> Any:
    """A vector over columns, or a number for all of them, as [G, R, columns]; a vector out of a bank as it lies, if
    problem g reads row g of it."""
    if isinstance(value, Banked) and isinstance(value.array, Cut | Picked) and elements(value.array) == columns:
        in_order = [value.rows[group[0]] for group in how.order] == list(range(how.groups))
        if in_order and how.per_group == 1 and op.batch == 1:
            return as_vectors(value.array, columns)
    x = by_place(value, how)
    return jnp.broadcast_to(x.reshape(*x.shape[:2], -1), (*x.shape[:2], columns))


def elements(array: Any) -> int:
    """Of a row of a cut, or of picked rows."""
    array = array.array if isinstance(array, Picked) else array
    return prod(array.shape if isinstance(array, Cut) else array.shape[1:])


def as_vectors(array: Any, n: int) -> Any:
    """A cut, or picked rows, of which each holds `n` elements: as vectors."""
    if isinstance(array, Picked) and not isinstance(array.array, Cut):
        return Picked(array.array.reshape(-1, n), array.slots)
    return array
