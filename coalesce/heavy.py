"""Heavy ops: `dot_general` and `conv_general_dilated`, seen as the matrix product they are.

    GEMM dims: B batch (or feature groups), M rows, N columns, K contraction; FLOPs = 2 B M N K

The forms read here are those `canonicalize` leaves: dots as [B.., M.., K..] x [B.., K.., N..], convolutions channels
last.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from math import prod
from typing import Any

from jax import lax

from coalesce import jaxpr as J
from coalesce.structure import eqn_key

HEAVY = frozenset({"dot_general", "conv_general_dilated"})


@dataclass(frozen=True)
class HeavyOp:
    """One dot or convolution of one program.

    Two ops with equal `key` may share a superkernel: same shapes, dtypes, precision, accumulation type and parameters.
    """

    kind: str  # "dot" or "conv"
    batch: int
    m: int
    n: int
    k: int
    lhs: Any  # ShapeDtypeStruct
    rhs: Any
    out: Any
    params: Any  # the equation's parameters: hashable as `key` is
    key: Hashable
    context: Hashable = ()  # what of the equation's context changes what it computes: J.context_key

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k

    @property
    def empty(self) -> bool:
        """Whether an operand or the result has no elements."""
        return 0 in (*self.lhs.shape, *self.rhs.shape, *self.out.shape)

    @property
    def precision(self) -> Any:
        return self.params["precision"]

    @property
    def shape(self) -> str:
        """`56x56x64 * 3x3 -> 64` style is for people who know convs; everyone reads M, N, K."""
        size = f"M={self.m} N={self.n} K={self.k}"
        size = f"B={self.batch} {size}" if self.batch > 1 else size
        window = ""
        if self.kind == "conv":
            window = " " + "x".join(map(str, self.rhs.shape[:-2]))
            strides = self.params["window_strides"]
            window += f"/{'x'.join(map(str, strides))}" if set(strides) != {1} else ""
            groups = self.params["feature_group_count"]
            window += f" groups={groups}" if groups > 1 else ""
        return f"{self.kind}{window} {size} {J.short(self.lhs)} x {J.short(self.rhs)}"


def is_heavy(eqn: J.Eqn) -> bool:
    return eqn.primitive.name in HEAVY


def is_usual(precision: Any) -> bool:
    """Whether it asks for no more than "high", which is also "tensorfloat32": of operands of two bytes or more that is
    what XLA and Triton do on a CPU and a GPU for who asks for nothing. On a TPU "high" is more."""
    if type(precision) is not tuple:  # an algorithm is one of another type
        return precision is None
    return {lax.Precision.DEFAULT, lax.Precision.HIGH}.issuperset(precision)


def heavy_op(eqn: J.Eqn) -> HeavyOp:
    lhs, rhs = (J.aval_struct(a.aval) for a in eqn.invars)
    out = J.aval_struct(eqn.outvars[0].aval)
    key = (eqn_key(eqn), lhs.shape, str(lhs.dtype), rhs.shape, str(rhs.dtype))
    dims = dot_dims if eqn.primitive.name == "dot_general" else conv_dims
    kind = "dot" if eqn.primitive.name == "dot_general" else "conv"
    sizes = dims(eqn.params, lhs.shape, rhs.shape, out.shape)
    return HeavyOp(kind, *sizes, lhs, rhs, out, eqn.params, key, J.context_key(eqn))


def dot_dims(
    params: Any, lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...]
) -> tuple[int, int, int, int]:
    (lc, rc), (lb, rb) = params["dimension_numbers"]
    batch, k = prod(lhs[d] for d in lb), prod(lhs[d] for d in lc)
    m = prod(s for d, s in enumerate(lhs) if d not in lc and d not in lb)
    n = prod(s for d, s in enumerate(rhs) if d not in rc and d not in rb)
    return batch, m, n, k


def conv_dims(
    params: Any, lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...]
) -> tuple[int, int, int, int]:
    spec = params["dimension_numbers"]
    groups = params["feature_group_count"] * params["batch_group_count"]
    window = prod(rhs[d] for d in spec.rhs_spec[2:])
    positions = prod(out[d] for d in spec.out_spec[2:])
    return groups, out[spec.out_spec[0]] * positions, rhs[spec.rhs_spec[0]] // groups, window * rhs[spec.rhs_spec[1]]


def heavy_eqns(jaxpr: Any) -> list[J.Eqn]:
    """Every heavy op of a jaxpr, bodies counted once and every branch counted."""
    return [eqn for eqn in J.walk(jaxpr) if is_heavy(eqn)]
