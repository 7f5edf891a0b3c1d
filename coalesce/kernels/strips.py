"""Columns of a product's result in strips of equal width, which a kernel computes side by side, a block of each.

    split %y [sizes=(w, w, w, w)]      four values of one strip
    slice %y [w : 3w]                  a value of two
    concatenate %a %b                  their strips one after the other

The gates of a recurrent cell and the halves of a gated unit are columns of one product: whoever holds the strips of a
block has all that the cell does to it. A value is the list of its strips; elementwise work is done to each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import gcd, prod
from typing import Any

from coalesce import jaxpr as J
from coalesce.heavy import HeavyOp
from coalesce.kernels.epilogue import on_tile

MOST = 8  # strips of a result: each has sums of its own in the kernel's registers


def edges(eqn: J.Eqn) -> list[int] | None:
    """The columns at which an equation takes values apart or puts them together; None if it does something else."""
    last = len(J.shape(eqn.outvars[0])) - 1
    match eqn.primitive.name:
        case "split" if eqn.params["axis"] == last:
            return list(accumulate(map(int, eqn.params["sizes"])))
        case "concatenate" if eqn.params["dimension"] == last:
            return list(accumulate(J.shape(a)[-1] for a in eqn.invars))
        case "slice" if last >= 0 and set(eqn.params["strides"] or (1,)) == {1}:
            rows = J.shape(eqn.invars[0])[:-1]
            whole = not any(eqn.params["start_indices"][:-1]) and tuple(eqn.params["limit_indices"][:-1]) == rows
            return [eqn.params["start_indices"][-1], eqn.params["limit_indices"][-1]] if whole else None
    return None


def column_dims(op: HeavyOp) -> int:
    """How many of the last dimensions of a result its columns are."""
    if op.kind == "conv":
        return 1
    ((contracted, _), (batch, _)) = op.params["dimension_numbers"]
    return len(op.rhs.shape) - len(batch) - len(contracted)


def columns_of(op: HeavyOp, shape: Sequence[int]) -> int:
    """How many columns a value has that is computed from a result, or a vector over them."""
    return shape[-1] if column_dims(op) == 1 else op.n


def has_rows(op: HeavyOp, shape: Sequence[int]) -> bool:
    """Whether a value has the rows of a result, and is no vector over columns: of one row all are vectors."""
    if op.batch * op.m == 1:
        return False
    if column_dims(op) != 1:
        return tuple(shape) == tuple(op.out.shape)
    return len(shape) == len(op.out.shape) and tuple(shape[:-1]) == tuple(op.out.shape[:-1])


def is_number(shape: Sequence[int]) -> bool:
    return prod(shape) == 1


def strip_width(op: HeavyOp, eqns: Iterable[J.Eqn]) -> int:
    """The widest strips that a result's columns, and all that equations read and compute, are made of."""
    width = op.n
    for eqn in eqns if column_dims(op) == 1 else ():
        width = gcd(width, *(edges(eqn) or ()))
        shapes = [J.shape(a) for a in (*eqn.invars, *eqn.outvars)]
        width = gcd(width, *(shape[-1] for shape in shapes if not is_number(shape)))
    return width


def on_strips(eqn: J.Eqn, args: Sequence[Sequence[Any]], width: int) -> list[list[Any]]:
    """The strips of each result, from those of each operand; numbers have one, which goes with all."""
    match eqn.primitive.name:
        case "split":
            ends = [end // width for end in accumulate(map(int, eqn.params["sizes"]))]
            return [list(args[0][a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        case "concatenate":
            return [[tile for arg in args for tile in arg]]
        case "slice":
            start, end = (eqn.params[name][-1] // width for name in ("start_indices", "limit_indices"))
            return [list(args[0][start:end])]
    count = max(len(arg) for arg in args)
    return [[on_tile(eqn, [arg[i] if len(arg) > 1 else arg[0] for arg in args]) for i in range(count)]]
