"""Convolutions as one grouped convolution over [N, spatial.., G*C], with weights packed ahead as [G*O, window.., I].

A weight that arrives as a run-time argument with O last costs a transpose on every call on a GPU; with O first it does
not.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from coalesce.heavy import HeavyOp
from coalesce.layout import AS_IS, Layout


def supports(op: HeavyOp) -> bool:
    return op.kind == "conv" and op.params["batch_group_count"] == 1 and not op.empty


def layout(op: HeavyOp) -> Layout:
    """[window.., I, O] -> [O, window.., I]."""
    d = op.rhs.ndim
    return AS_IS.transpose((d - 1, *range(d - 2), d - 2))


def run(op: HeavyOp, lhs: Any, rhs: Any) -> Any:
    """lhs [G,R,N,spatial..,C] x rhs [G,O,window..,I] -> [G,R,N,spatial..,O]."""
    g, r, n, *spatial, c = lhs.shape
    d, o = len(spatial), op.out.shape[-1]
    x = jnp.moveaxis(lhs.reshape(g, r * n, *spatial, c), 0, -2).reshape(r * n, *spatial, g * c)
    data = (0, d + 1, *range(1, d + 1))
    numbers = lax.ConvDimensionNumbers(data, (0, d + 1, *range(1, d + 1)), data)
    params = {k: v for k, v in op.params.items() if k not in ("dimension_numbers", "feature_group_count")}
    params.pop("batch_group_count")
    groups = op.params["feature_group_count"] * g
    y = lax.conv_general_dilated(
        x, rhs.reshape(g * o, *rhs.shape[2:]), dimension_numbers=numbers, feature_group_count=groups, **params
    )
    y = jnp.moveaxis(y.reshape(*y.shape[:-1], g, o), -2, 0)
    return y.reshape(g, r, n, *y.shape[2:])
