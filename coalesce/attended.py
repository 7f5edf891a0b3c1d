"""What dimensions count in attention: heads, and rows and columns of the scores of a head. Those of size one count
nothing, and may stand anywhere: jax.nn.dot_product_attention has one for groups of heads, and one for batches.

A product [heads.., rows, k] x [heads.., k, columns] begins it. `Attended` follows what is made of the scores, equation
by equation, as long as each number of it belongs to one score, or to one row of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coalesce import jaxpr as J
from coalesce.heavy import HeavyOp
from coalesce.kernels.attention import COLUMN, Dim, REDUCTIONS, ROW, SAME
from coalesce.kernels.epilogue import runs_on_tiles

Dims = tuple[Dim, ...]


def is_plain(op: HeavyOp) -> bool:
    """Whether it is [B.., *left, K] x [B.., K, *right], and of left, and of right, at most one is more than one."""
    if op.kind != "dot":
        return False
    ((left_k, right_k), (left_b, right_b)) = op.params["dimension_numbers"]
    batch = tuple(range(len(left_b)))
    if left_b != batch or right_b != batch or left_k != (len(op.lhs.shape) - 1,) or right_k != (len(batch),):
        return False
    return all(own and sum(size > 1 for size in own) <= 1 for own in sides(op))


def heads_of(op: HeavyOp) -> int:
    """How many dimensions."""
    return len(op.params["dimension_numbers"][1][0])


def sides(op: HeavyOp) -> tuple[tuple[int, ...], tuple[int, ...]]:
    heads = heads_of(op)
    return tuple(op.lhs.shape[heads:-1]), tuple(op.rhs.shape[heads + 1 :])


def left_dims(op: HeavyOp, heads: Dims, free: Dim = ROW, contracted: Dim = COLUMN) -> Dims:
    return (*heads, *marked(sides(op)[0], free), contracted)


def right_dims(op: HeavyOp, heads: Dims, contracted: Dim = ROW, free: Dim = COLUMN) -> Dims:
    return (*heads, contracted, *marked(sides(op)[1], free))


def out_dims(op: HeavyOp, heads: Dims, left: Dim = ROW, right: Dim = COLUMN) -> Dims:
    return (*heads, *marked(sides(op)[0], left), *marked(sides(op)[1], right))


def marked(sizes: Sequence[int], dim: Dim) -> Dims:
    """The one that is more than one; the last, if none is."""
    at = next((i for i, size in enumerate(sizes) if size > 1), len(sizes) - 1)
    return tuple(dim if i == at else None for i in range(len(sizes)))


class Attended:
    """`of` has the dimensions of each value that is made of scores, `reads` those of whatever else is read for it."""

    def __init__(self, scores: HeavyOp, result: J.Var) -> None:
        self.heads: Dims = tuple(
            i if size > 1 else None for i, size in enumerate(scores.out.shape[: heads_of(scores)])
        )
        self.columns = scores.n
        self.of: dict[Any, Dims] = {result: counted(out_dims(scores, self.heads), scores.out.shape)}
        self.reads: dict[Any, Dims] = {}

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
