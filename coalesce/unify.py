"""One shape for several heavy ops, so that one superkernel can run them.

    equal      the ops have one key: nothing is padded
    padded     one geometry, other sizes: every dimension is padded to the largest, and results can stay stacked
    product    any dots and ungrouped convolutions, each as the matrix product that it is: [G,M,K] x [G,K,N], padded in
               M, K and N; batch dimensions become problems of their own, lanes that share weights become rows

What is padded never counts: a contraction reads zeros there, and results there are cut away.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from coalesce.heavy import conv_dims, dot_dims, HeavyOp

FORMS = ("equal", "padded", "product")  # the first that fits is the best
PRODUCT = (((1,), (0,)), ((), ()))  # dimension numbers of [M,K] x [K,N]


@dataclass(frozen=True)
class Unified:
    """`op` is what the superkernel runs."""

    form: str  # "equal", "padded" or "product"
    op: HeavyOp

    def waste(self, op: HeavyOp, rows: int) -> float:
        """The share of the FLOPs spent on a problem of one member that is padding, 0 to 1."""
        own, spent = op.flops, self.op.flops
        if self.form == "product":
            own, spent = own * rows, spent * op.batch
        return 1 - own / spent if spent else 0.0


def arithmetic(op: HeavyOp) -> Hashable:
    """What the ops of a superkernel must agree on, whatever their shapes: it is what a tenant asked for.

    The result's dtype is that of the accumulation, whether a preferred_element_type names it or not.
    """
    return (str(op.lhs.dtype), str(op.rhs.dtype), str(op.out.dtype), op.precision, op.context)


def geometry(op: HeavyOp) -> Hashable:
    """What ops must agree on to be padded dimension by dimension."""
    if op.kind == "dot":
        return ("dot", op.params["dimension_numbers"], len(op.lhs.shape), len(op.rhs.shape))
    params, depthwise = op.params, is_depthwise(op)
    if params["batch_group_count"] > 1 or (params["feature_group_count"] > 1 and not depthwise):
        return op.key
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    window = op.rhs.shape[:-2]
    return ("conv", depthwise, window, *(params[name] for name in names))


def is_depthwise(op: HeavyOp) -> bool:
    """One filter a channel: groups, channels and results count the same and can be padded as one dimension."""
    return op.kind == "conv" and op.params["feature_group_count"] == op.lhs.shape[-1] == op.rhs.shape[-1] > 1


def is_product(op: HeavyOp) -> bool:
    """Whether the op can run as a plain matrix product."""
    if op.empty:
        return False
    return op.kind == "dot" or op.params["feature_group_count"] == op.params["batch_group_count"] == 1


def unify(ops: Sequence[HeavyOp], rows: Sequence[int], forms: Sequence[str]) -> Unified | None:
    """The first of `forms` in which the ops can share one superkernel; None if there is none.

    Args:
      rows: for each op, how many lanes share a problem of it; a plain product takes them as its own rows.
    """
    if len({arithmetic(op) for op in ops}) > 1:
        return None
    if "equal" in forms and len({op.key for op in ops}) == 1:
        return Unified("equal", ops[0])
    if "padded" in forms and len({geometry(op) for op in ops}) == 1 and not any(op.empty for op in ops):
        return Unified("padded", padded(ops))
    if "product" in forms and all(map(is_product, ops)):
        return Unified("product", product(ops, rows))
    return None


def largest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(max, zip(*shapes, strict=True)))


def padded(ops: Sequence[HeavyOp]) -> HeavyOp:
    """The op whose every dimension is the largest among those of `ops`, which have one geometry."""
    first = ops[0]
    lhs, rhs, out = (largest([getattr(op, side).shape for op in ops]) for side in ("lhs", "rhs", "out"))
    params = dict(first.params)
    if is_depthwise(first):
        params["feature_group_count"] = lhs[-1]
    return resized(first, params, lhs, rhs, out)


def product(ops: Sequence[HeavyOp], rows: Sequence[int]) -> HeavyOp:
    """[M,K] x [K,N], large enough for each op with its lanes as rows."""
    m = max(op.m * r for op, r in zip(ops, rows, strict=True))
    n, k = max(op.n for op in ops), max(op.k for op in ops)
    like = ops[0]
    params = {"dimension_numbers": PRODUCT, "precision": like.precision, "preferred_element_type": like.out.dtype}
    return resized(replace(like, kind="dot"), params, (m, k), (k, n), (m, n))


def resized(like: HeavyOp, params: Any, lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...]) -> HeavyOp:
    batch, m, n, k = (dot_dims if like.kind == "dot" else conv_dims)(params, lhs, rhs, out)
    x, w, y = (
        jax.ShapeDtypeStruct(shape, side.dtype)
        for shape, side in zip((lhs, rhs, out), (like.lhs, like.rhs, like.out), strict=True)
    )
    key = (like.kind, lhs, rhs, out, tuple(sorted((k, str(v)) for k, v in params.items())), arithmetic(like))
    return HeavyOp(like.kind, batch, m, n, k, x, w, y, params, key, like.context)


def contracted(op: HeavyOp) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dimensions of the left and of the right operand in which padding must be zero."""
    if op.kind == "dot":
        return op.params["dimension_numbers"][0]
    spatial = tuple(range(1, len(op.lhs.shape)))
    return spatial, tuple(range(len(op.rhs.shape) - 1))
