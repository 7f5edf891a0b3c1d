"""What a kernel may do to its result before it writes it: which equations run on tiles of a pack's result, and what of
that is left.

A tail is equations of the pack's family in the order in which they run, and `results` of what they compute that others
read. Two or more results, or some of the columns, are for kernels that take columns apart (TAKES_APART), and are never
more bytes than the product's own result; taking columns apart is not done for its own sake, for who reads a slice reads
it where it lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from coalesce import jaxpr as J
from coalesce.bundle import Pack, Step
from coalesce.kernels import TAKES_APART
from coalesce.kernels.epilogue import runs_on_tiles
from coalesce.kernels.strips import column_dims, edges, MOST, strip_width

DTYPES = ("float32", "bfloat16", "float16", "bool")
MOVES = ("broadcast_in_dim", "concatenate", "slice", "split")


class Tail(NamedTuple):
    places: tuple[int, ...] = ()  # of its steps, each after what it reads
    results: tuple[Any, ...] = ()


class Shapes:
    """What may be part of a pack's tail, by its shape and operation."""

    def __init__(self, pack: Pack, kernel: str) -> None:
        self.op = pack.op
        self.product = pack.members[0].eqn.outvars[0]
        self.apart = kernel in TAKES_APART and pack.launch is None
        self.one_row = pack.op.m * pack.op.batch == 1

    def of_result(self, shape: Sequence[int]) -> bool:
        """Whether a value has the rows of the result, and its columns or some strips of them, at least one."""
        out = self.op.out.shape
        if not self.apart or column_dims(self.op) != 1:
            return tuple(shape) == tuple(out)
        return len(shape) == len(out) and tuple(shape[:-1]) == tuple(out[:-1]) and shape[-1] > 0

    def runs(self, step: Step) -> bool:
        """Whether a step can run on tiles, whatever it reads."""
        eqn = step.eqn
        if step.each or any(J.dtype(a) not in DTYPES for a in [*eqn.invars, *eqn.outvars]):
            return False
        if not all(self.of_result(J.shape(v)) for v in eqn.outvars):
            return False
        if any(isinstance(a, J.Literal) and J.shape(a) for a in eqn.invars):
            return False
        return runs_on_tiles(eqn) or (self.apart and column_dims(self.op) == 1 and edges(eqn) is not None)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an operand is a number, or has an element for each of the result's, or of some strips of it, or for
        each of its columns."""
        if shape == () or self.of_result(shape):
            return True
        if len(shape) != len(self.op.out.shape):
            return False
        return prod(shape) == 1 or self.spans_columns(shape, range(len(shape)), self.op.out.shape)

    def is_column(self, step: Step) -> bool:
        """Whether a step repeats a number, or a vector over columns, over all rows."""
        eqn = step.eqn
        if step.each or eqn.primitive.name != "broadcast_in_dim" or not self.of_result(J.shape(eqn.outvars[0])):
            return False
        vector, *sizes = eqn.invars
        shape = J.shape(eqn.outvars[0])
        if sizes or J.shape(vector) == shape:
            return False
        if isinstance(vector, J.Literal) or J.shape(vector) == ():
            return J.shape(vector) == ()
        return self.spans_columns(J.shape(vector), eqn.params["broadcast_dimensions"], shape)

    def spans_columns(self, vector: Sequence[int], dims: Sequence[int], shape: Sequence[int]) -> bool:
        """Whether a broadcast to a shape keeps every column and repeats over all rows."""
        columns = set(range(len(shape) - column_dims(self.op), len(shape)))
        kept = {dim for size, dim in zip(vector, dims, strict=True) if size == shape[dim] and size > 1}
        number = prod(shape[dim] for dim in columns)
        return bool(columns) and prod(vector) == number and kept == {dim for dim in columns if shape[dim] > 1}

    def parts(self, eqns: Iterable[J.Eqn]) -> int:
        """In how many strips a kernel has to have the result's columns for these equations."""
        return self.op.n // strip_width(self.op, eqns)

    def few_parts(self, eqns: Iterable[J.Eqn]) -> bool:
        return self.parts(eqns) <= MOST

    def may_leave(self, results: Sequence[Any], made: Mapping[Any, J.Eqn]) -> bool:
        """Whether a kernel may leave these; `made` says by which equation each is computed, but for the product."""
        if not results or any(v not in made or not_worth(made[v]) or J.dtype(v) not in DTYPES[:3] for v in results):
            return False
        if len(results) == 1 and J.shape(results[0]) == self.op.out.shape:
            return True
        return self.apart and sum(J.nbytes(v.aval) for v in results) <= J.nbytes(self.product.aval)


def not_worth(eqn: J.Eqn) -> bool:
    """Whether it only moves elements, or is a cast after which the same values take more bytes: for who reads it."""
    widens = eqn.primitive.name == "convert_element_type" and J.nbytes(eqn.outvars[0].aval) > J.nbytes(
        eqn.invars[0].aval
    )
    return widens or eqn.primitive.name in MOVES
