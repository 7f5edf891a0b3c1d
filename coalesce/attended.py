"""What dimensions count in attention: heads, and rows and columns of the scores of a head. Those of size one count
nothing, and may stand anywhere: jax.nn.dot_product_attention has one for groups of heads, and one for batches.

A product [heads.., rows, k] x [heads.., k, columns] begins it; several heads of queries may share one of keys.
`Attended` follows what is made of the scores, equation by equation, as long as each number of it belongs to one score,
or to one row of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

from coalesce import jaxpr as J
from coalesce.heavy import HeavyOp
from coalesce.kernels.attention import COLUMN, Dim, REDUCTIONS, ROW, SAME
from coalesce.kernels.epilogue import runs_on_tiles

Dims = tuple[Dim, ...]


def is_plain(op: HeavyOp) -> bool:
    """Whether it is [B.., *left, K] x [B.., K, *right], and of left, or of right, at most one is more than one."""
    if op.kind != "dot":
        return False
    ((left_k, right_k), (left_b, right_b)) = op.params["dimension_numbers"]
    batch = tuple(range(len(left_b)))
    if left_b != batch or right_b != batch or left_k != (len(op.lhs.shape) - 1,) or right_k != (len(batch),):
        return False
    left, right = sides(op)
    return bool(left and right) and (is_single(left) or is_single(right))


def heads_of(op: HeavyOp) -> int:
    """How many dimensions."""
    return len(op.params["dimension_numbers"][1][0])


def sides(op: HeavyOp) -> tuple[tuple[int, ...], tuple[int, ...]]:
    heads = heads_of(op)
    return tuple(op.lhs.shape[heads:-1]), tuple(op.rhs.shape[heads + 1 :])


def is_single(sizes: Sequence[int]) -> bool:
    return sum(size > 1 for size in sizes) <= 1


def marked(sizes: Sequence[int], dim: Dim, more: int = 0) -> Dims:
    """The largest, or the last if none is more than one; the others are heads, numbered from `more` on."""
    at = max(range(len(sizes)), key=lambda i: (sizes[i], -i)) if max(sizes) > 1 else len(sizes) - 1
    numbers = count(more)
    return tuple(dim if i == at else next(numbers) if size > 1 else None for i, size in enumerate(sizes))


class Attended:
    """`of` has the dimensions of each value that is made of scores, `reads` those of whatever else is read for it."""

    def __init__(self, scores: HeavyOp, result: J.Var) -> None:
        heads, (left, right) = heads_of(scores), sides(scores)
        self.heads: Dims = counted(tuple(range(heads)), scores.out.shape[:heads])
        self.rows, self.columns = max(left), scores.n
        q, k = marked(left, ROW, heads), marked(right, COLUMN)
        self.left, self.right = (*self.heads, *q, COLUMN), (*self.heads, ROW, *k)  # of the product
        # Several queries read the keys of one head: those are heads of their own.
        more = [size for dim, size in zip(q, left, strict=True) if isinstance(dim, int)]
        self.sizes = (*scores.out.shape[:heads], *more)
        self.of: dict[Any, Dims] = {result: counted((*self.heads, *q, *k), scores.out.shape)}
        self.reads: dict[Any, Dims] = {}

    def values(self, op: HeavyOp, weights: Any, left: bool) -> tuple[Dims, Dims] | None:
        """The dimensions of what a product multiplies by weights, which are on its left or on its right, and of its
        result; None if that is no product along rows."""
        dims, heads, (mine, others) = self.of[weights], heads_of(op), sides(op)[:: 1 if left else -1]
        contracted, free = (dims[-1], dims[heads:-1]) if left else (dims[heads], dims[heads + 1 :])
        wanted = {*range(len(self.heads), len(self.sizes)), *([ROW] if self.rows > 1 else [])}
        if dims[:heads] != self.heads or contracted != (COLUMN if self.columns > 1 else None):
            return None
        if {dim for dim in free if dim is not None} != wanted or not is_single(others):
            return None
        if self.rows == 1:
            at = next((i for i in reversed(range(len(free))) if mine[i] == 1), None)
            if at is None:
                return None
            free = (*free[:at], ROW, *free[at + 1 :])
        own = marked(others, COLUMN)
        if left:
            return (*self.heads, ROW, *own), (*self.heads, *free, *own)
        return (*self.heads, *own, ROW), (*self.heads, *own, *free)

    def follow(self, eqn: J.Eqn) -> bool:
        """Whether an equation can run on rows; then its result is known."""
        dims = self.made_by(eqn)
        if dims is not None:
            self.of[eqn.outvars[0]] = dims
        return dims is not None

    def made_by(self, eqn: J.Eqn) -> Dims | None:
        name, out, first = eqn.primitive.name, J.shape(eqn.outvars[0]), eqn.invars[0]
        if name not in SAME and name not in REDUCTIONS and name != "transpose":
            return self.elementwise(eqn) if runs_on_tiles(eqn) else None
        own = None if isinstance(first, J.Literal) else self.of.get(first)
        if own is None or len(eqn.invars) > 1:
            return None
        if name == "transpose":
            return tuple(own[i] for i in eqn.params["permutation"])
        if name in REDUCTIONS:
            over = {own[axis] for axis in eqn.params["axes"]} - {None}
            along_rows = over == {COLUMN} or (self.columns == 1 and not over)
            kept = tuple(dim for axis, dim in enumerate(own) if axis not in eqn.params["axes"])
            return kept if along_rows and J.dtype(eqn.outvars[0]) != "bool" else None
        if out == J.shape(first):
            return own
        if name == "broadcast_in_dim":
            found: list[Dim] = [None] * len(out)
            for axis, dim in zip(eqn.params["broadcast_dimensions"], own, strict=True):
                found[axis] = dim
            return self.spread(found, out)
        return regrouped(own, J.shape(first), out)

    def elementwise(self, eqn: J.Eqn) -> Dims | None:
        out = J.shape(eqn.outvars[0])
        inside = [self.of[a] for a in eqn.invars if not isinstance(a, J.Literal) and a in self.of]
        if any(len(own) != len(out) for own in inside):
            return None
        found: list[Dim] = []
        for dims in zip(*inside, strict=True) if inside else [()] * len(out):
            named = {dim for dim in dims if dim is not None}
            if len(named) > 1:
                return None
            found.append(next(iter(named), None))
        whole = self.spread(found, out)
        others = [a for a in eqn.invars if not isinstance(a, J.Literal) and a not in self.of]
        return whole if whole is not None and all(self.read(a, whole, out) for a in others) else None

    def read(self, atom: J.Var, whole: Dims, out: Sequence[int]) -> bool:
        """Whether a value has for each head, row and column a number or one for all."""
        sizes = J.shape(atom)
        pairs = zip(sizes, out, strict=False)
        if sizes and (len(sizes) != len(out) or any(own not in (1, size) for own, size in pairs)):
            return False
        dims = counted(whole, sizes) if sizes else ()
        return self.reads.setdefault(atom, dims) == dims

    def spread(self, dims: Sequence[Dim], sizes: Sequence[int]) -> Dims | None:
        """A number for each row becomes one for each score where a dimension that counts nothing has as many."""
        unknown = [i for i, (dim, size) in enumerate(zip(dims, sizes, strict=True)) if dim is None and size > 1]
        if not unknown:
            return tuple(dims)
        if len(unknown) > 1 or COLUMN in dims or sizes[unknown[0]] != self.columns:
            return None
        return tuple(COLUMN if i == unknown[0] else dim for i, dim in enumerate(dims))


def regrouped(dims: Dims, sizes: Sequence[int], new: Sequence[int]) -> Dims | None:
    """Of a reshape that leaves out dimensions of size one, or adds some; None of any other."""
    rest = [(dim, size) for dim, size in zip(dims, sizes, strict=True) if size > 1]
    if [size for _, size in rest] != [size for size in new if size > 1]:
        return None
    left = iter(rest)
    return tuple(next(left)[0] if size > 1 else None for size in new)


def counted(dims: Dims, sizes: Sequence[int]) -> Dims:
    """Without those of size one."""
    return tuple(dim if size > 1 else None for dim, size in zip(dims, sizes, strict=True))
