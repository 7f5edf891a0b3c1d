"""Dots as one dot_general with a leading batch dimension; lanes that share weights become rows of one product."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from coalesce.heavy import HeavyOp
from coalesce.layout import AS_IS, Layout


def supports(op: HeavyOp) -> bool:
    return op.kind == "dot"


def layout(op: HeavyOp) -> Layout:
    return AS_IS


def run(op: HeavyOp, lhs: Any, rhs: Any) -> Any:
    """lhs [G,R,B..,M..,K..] x rhs [G,B..,K..,N..] -> [G,R,B..,M..,N..]."""
    ((lc, rc), (lb, _)) = op.params["dimension_numbers"]
    groups, per_group = lhs.shape[:2]
    b = len(lb)  # canonical: batch dimensions lead on both sides
    lead = int(groups > 1)  # one group needs no batch dimension
    if not lead:
        lhs, rhs = lhs[0], rhs[0]
    fold = per_group > 1
    if not fold:
        lhs = lhs.reshape(lhs.shape[:lead] + lhs.shape[lead + 1 :])
    skip = lead + fold  # dimensions of lhs before its own
    batch_left = (*range(lead), *(skip + d for d in range(b)))
    batch_right = (*range(lead), *(lead + d for d in range(b)))
    contract = tuple(skip + d for d in lc), tuple(lead + d for d in rc)
    params = {k: v for k, v in op.params.items() if k in ("precision", "preferred_element_type")}
    out = lax.dot_general(lhs, rhs, (contract, (batch_left, batch_right)), **params)
    if fold:  # [G, B.., R, M.., N..]
        out = jnp.moveaxis(out, lead + b, lead)
    return out.reshape(groups, per_group, *op.out.shape)
