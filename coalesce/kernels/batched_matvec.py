"""Dots with one row as one batched product against weights kept with the contracting dimension last.

XLA turns such a dot into multiply and reduce, which reads a row of weights as it lies. Kept as [K, N], the weights of
a recurrent layer were transposed on every call, before the loop.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from coalesce.heavy import HeavyOp
from coalesce.kernels import batched_dot
from coalesce.layout import AS_IS, Layout


def supports(op: HeavyOp) -> bool:
    return op.kind == "dot"


def layout(op: HeavyOp) -> Layout:
    """[B.., K.., N..] -> [B.., N.., K..]."""
    b, k = contracted(op)
    rank = len(op.rhs.shape)
    return AS_IS.transpose((*range(b), *range(b + k, rank), *range(b, b + k)))


def run(op: HeavyOp, lhs: Any, rhs: Any) -> Any:
    """lhs [G,R,B..,M..,K..] x rhs [G,B..,N..,K..] -> [G,R,B..,M..,N..]."""
    b, k = contracted(op)
    n = len(op.rhs.shape) - b - k
    # A transpose of the operand, which XLA takes into the product: the weights lie as the product reads them.
    order = (*range(1 + b), *range(1 + b + n, 1 + b + n + k), *range(1 + b, 1 + b + n))
    return batched_dot.run(op, lhs, jnp.transpose(rhs, order))


def contracted(op: HeavyOp) -> tuple[int, int]:
    """(batch dimensions, contracting dimensions) of an operand."""
    ((lc, _), (lb, _)) = op.params["dimension_numbers"]
    return len(lb), len(lc)
