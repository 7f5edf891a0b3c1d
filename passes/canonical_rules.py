"""The rules of `canonicalize`, by primitive. Each rule is View -> Answer (see coalesce.rewrite)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from coalesce import jaxpr as J
from coalesce.heavy import is_usual
from coalesce.rewrite import Answer, Rules, Staged, View

# ---- dot_general ---------------------------------------------------------------------------------------------------


def weights_on_the_right(view: View) -> Answer:
    lhs, rhs = view.operands
    if not view.is_weight(lhs) or view.is_weight(rhs):
        return None
    params = {**view.eqn.params, "precision": other_way_round(view.eqn.params["precision"])}
    return Staged(swapped_dot, [rhs, lhs], freeze(params))


def other_way_round(precision: Any) -> Any:
    """A precision that may say one thing for each operand, for operands that change places."""
    if isinstance(precision, lax.DotAlgorithm):
        sides = {
            "lhs_precision_type": precision.rhs_precision_type,
            "rhs_precision_type": precision.lhs_precision_type,
            "lhs_component_count": precision.rhs_component_count,
            "rhs_component_count": precision.lhs_component_count,
        }
        return precision._replace(**sides)
    return precision[::-1] if isinstance(precision, tuple) else precision


def swapped_dot(rhs, lhs, *, dimension_numbers, **params):
    ((lc, rc), (lb, rb)) = dimension_numbers
    out = lax.dot_general(rhs, lhs, ((rc, lc), (rb, lb)), **keep(params))
    batch, right = len(lb), rhs.ndim - len(rc) - len(rb)
    left = lhs.ndim - len(lc) - len(lb)
    # [batch, right, left] -> [batch, left, right]
    order = [*range(batch), *range(batch + right, batch + right + left), *range(batch, batch + right)]
    return lax.transpose(out, order)


def dimensions_in_order(view: View) -> Answer:
    lhs, rhs = view.operands
    ((lc, rc), (lb, rb)) = view.eqn.params["dimension_numbers"]
    left, right, numbers = ordered_dimensions(lhs.aval.ndim, rhs.aval.ndim, lc, rc, lb, rb)
    if (tuple(lc), tuple(rc), tuple(lb), tuple(rb)) == (*numbers[0], *numbers[1]):
        return None
    return Staged(ordered_dot, [lhs, rhs], {"left": left, "right": right, **freeze(view.eqn.params)})


def ordered_dimensions(l_ndim, r_ndim, lc, rc, lb, rb):
    """(permutation of the left operand, of the right, the canonical dimension numbers)."""
    pairs = sorted(zip(lc, rc, strict=True))
    lc, rc = [p[0] for p in pairs], [p[1] for p in pairs]
    l_free = [d for d in range(l_ndim) if d not in lc and d not in lb]
    r_free = [d for d in range(r_ndim) if d not in rc and d not in rb]
    left, right = (*lb, *l_free, *lc), (*rb, *rc, *r_free)
    batch, k = tuple(range(len(lb))), len(lc)
    contract = tuple(range(l_ndim - k, l_ndim)), tuple(range(len(rb), len(rb) + k))
    return left, right, (contract, (batch, batch))


def ordered_dot(lhs, rhs, *, left, right, dimension_numbers, **params):
    (lc, rc), (lb, rb) = dimension_numbers
    _, _, numbers = ordered_dimensions(lhs.ndim, rhs.ndim, lc, rc, lb, rb)
    return lax.dot_general(lax.transpose(lhs, left), lax.transpose(rhs, right), numbers, **keep(params))


def result_type_named(view: View) -> Answer:
    """`nn.Dense` leaves preferred_element_type out where `jnp.einsum` writes down the type that it defaults to."""
    (lhs, rhs), out = (a.aval for a in view.operands), view.result.aval
    if view.eqn.params["preferred_element_type"] is not None or not lhs.dtype == rhs.dtype == out.dtype:
        return None
    return view.eqn.replace(params={**view.eqn.params, "preferred_element_type": out.dtype})


# ---- both ----------------------------------------------------------------------------------------------------------


def precision_as_usual(view: View) -> Answer:
    """Who asks for what everybody gets asks for nothing. Of operands of a byte, "high" has XLA add more precisely."""
    precision = view.eqn.params["precision"]
    if precision is None or not is_usual(precision) or min(a.aval.dtype.itemsize for a in view.operands) == 1:
        return None
    return view.eqn.replace(params={**view.eqn.params, "precision": None})


# ---- conv_general_dilated ------------------------------------------------------------------------------------------


def channels_last(view: View) -> Answer:
    spec, n = view.eqn.params["dimension_numbers"], view.operands[0].aval.ndim
    if spec == last_numbers(n):
        return None
    return Staged(transposed_conv, view.operands, freeze(view.eqn.params))


def last_numbers(ndim: int) -> lax.ConvDimensionNumbers:
    spatial = tuple(range(1, ndim - 1))
    data = (0, ndim - 1, *spatial)
    return lax.ConvDimensionNumbers(data, (ndim - 1, ndim - 2, *range(ndim - 2)), data)


def transposed_conv(lhs, rhs, *, dimension_numbers, **params):
    spec = dimension_numbers
    lhs = lax.transpose(lhs, (spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1]))
    rhs = lax.transpose(rhs, (*spec.rhs_spec[2:], spec.rhs_spec[1], spec.rhs_spec[0]))
    out = lax.conv_general_dilated(lhs, rhs, dimension_numbers=last_numbers(lhs.ndim), **keep(params))
    back = np.argsort((spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1]))
    return lax.transpose(out, tuple(int(d) for d in back))


def windows_apart(view: View) -> Answer:
    """1x1 kernels and kernels whose windows do not overlap: each input element is read at most once."""
    params, (lhs, rhs) = view.eqn.params, view.operands
    empty = 0 in (*lhs.aval.shape, *rhs.aval.shape, *view.result.aval.shape)
    if params["dimension_numbers"] != last_numbers(lhs.aval.ndim) or empty:
        return None
    kernel, strides = rhs.aval.shape[:-2], params["window_strides"]
    grouped = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
    dilated = set(params["lhs_dilation"]) - {1} or any(
        d > 1 and k > 1 for d, k in zip(params["rhs_dilation"], kernel, strict=True)
    )
    pointwise = all(k == 1 for k in kernel)
    patches = tuple(kernel) == tuple(strides) and all(p == (0, 0) for p in params["padding"])
    single = all(o == 1 for o in view.result.aval.shape[1:-1]) and all(p == (0, 0) for p in params["padding"])
    if grouped or dilated or not (pointwise or patches or single):
        return None
    options = {k: params[k] for k in ("window_strides", "padding", "precision", "preferred_element_type")}
    return Staged(dot_of_windows, view.operands, freeze(options))


def dot_of_windows(lhs, rhs, *, window_strides, padding, precision, preferred_element_type):
    kernel, (i, o) = rhs.shape[:-2], rhs.shape[-2:]
    if any(p != (0, 0) for p in padding):  # of 1x1 kernels only
        lhs = lax.pad(lhs, lhs.dtype.type(0), [(0, 0, 0), *((lo, hi, 0) for lo, hi in padding), (0, 0, 0)])
    n, c = lhs.shape[0], lhs.shape[-1]
    out = [(s - k) // w + 1 for s, k, w in zip(lhs.shape[1:-1], kernel, window_strides, strict=True)]
    if all(k == 1 for k in kernel):
        limits = [(m - 1) * w + 1 for m, w in zip(out, window_strides, strict=True)]
        patches = lax.slice(lhs, [0] * lhs.ndim, [n, *limits, c], [1, *window_strides, 1])
    else:
        patches = lax.slice(lhs, [0] * lhs.ndim, [n, *(m * k for m, k in zip(out, kernel, strict=True)), c])
        split = [d for m, k in zip(out, kernel, strict=True) for d in (m, k)]
        rank = len(kernel)
        outer, inner = [1 + 2 * d for d in range(rank)], [2 + 2 * d for d in range(rank)]
        patches = lax.transpose(lax.reshape(patches, [n, *split, c]), [0, *outer, *inner, 1 + 2 * rank])
        patches = lax.reshape(patches, [n, *out, int(np.prod(kernel)) * c])
    weights = lax.reshape(rhs, [int(np.prod(kernel)) * i, o])
    numbers = (((patches.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(patches, weights, numbers, precision, preferred_element_type)


# ---- shapes --------------------------------------------------------------------------------------------------------


def as_reshape(view: View) -> Answer:
    """broadcast_in_dim, squeeze and transpose that only move unit dimensions."""
    (operand, *dynamic), out = view.operands, view.result
    if dynamic or isinstance(operand, J.Literal) or np.prod(operand.aval.shape) != np.prod(out.aval.shape):
        return None
    if view.eqn.primitive.name == "broadcast_in_dim" and 0 in out.aval.shape:
        return None
    if view.eqn.primitive.name == "transpose":
        moved = [d for d in view.eqn.params["permutation"] if operand.aval.shape[d] != 1]
        if moved != sorted(moved):
            return None
    return Staged(reshape, [operand], {"shape": out.aval.shape})


def reshape(x, *, shape):
    return lax.reshape(x, shape)


def merge_reshapes(view: View) -> Answer:
    operand, out = view.operands[0], view.result
    if view.eqn.params["dimensions"] is not None or len(view.operands) > 1 or isinstance(operand, J.Literal):
        return None
    if operand.aval.shape == out.aval.shape:
        return [operand]
    inner = view.definition(operand, "reshape")
    if inner is None or inner.params["dimensions"] is not None or isinstance(inner.invars[0], J.Literal):
        return None
    return Staged(reshape, [inner.invars[0]], {"shape": out.aval.shape})


def merge_transposes(view: View) -> Answer:
    (operand,), order = view.operands, view.eqn.params["permutation"]
    if tuple(order) == tuple(range(len(order))):
        return [operand]
    inner = view.definition(operand, "transpose")
    if inner is None:
        return None
    return Staged(transpose, [inner.invars[0]], {"order": tuple(inner.params["permutation"][d] for d in order)})


def transpose(x, *, order):
    return lax.transpose(x, order)


# ---- what changes nothing ------------------------------------------------------------------------------------------


def same_type(view: View) -> Answer:
    (operand,), out = view.operands, view.result
    return [operand] if not isinstance(operand, J.Literal) and operand.aval.dtype == out.aval.dtype else None


def number_of_type(view: View) -> Answer:
    """A number that is cast is another number, where a cast rounds alike everywhere."""
    (operand,), out = view.operands, view.result.aval
    if not isinstance(operand, J.Literal) or not jnp.issubdtype(out.dtype, jnp.floating) or out.shape:
        return None
    value = np.asarray(J.literal_value(operand))
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        return None
    with np.errstate(over="ignore"):
        return [J.constant(value.astype(out.dtype), out)]


def first_operand(view: View) -> Answer:
    return [view.operands[0]]


def whole_slice(view: View) -> Answer:
    operand, out = view.operands[0], view.result
    return [operand] if operand.aval.shape == out.aval.shape else None


def commute(view: View) -> Answer:
    lhs, rhs = view.operands

    def rank(atom: J.Atom) -> int:
        return 2 if isinstance(atom, J.Literal) else int(view.is_weight(atom))

    longer = rank(lhs) == rank(rhs) and view.depth(lhs) > view.depth(rhs) > 0
    return J.respell(view.eqn, [rhs, lhs], view.eqn.outvars) if rank(lhs) > rank(rhs) or longer else None


def freeze(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters as hashable options."""
    return {k: tuple(map(tuple, v)) if k == "padding" else v for k, v in params.items()}


def keep(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters that the public function of a primitive takes."""
    return {k: v for k, v in params.items() if v is not None or k in ("precision", "preferred_element_type")}


RULES: Rules = {
    "dot_general": (precision_as_usual, weights_on_the_right, dimensions_in_order, result_type_named),
    "conv_general_dilated": (precision_as_usual, channels_last, windows_apart),
    "broadcast_in_dim": (as_reshape,),
    "squeeze": (as_reshape,),
    "reshape": (merge_reshapes,),
    "transpose": (as_reshape, merge_transposes),
    "convert_element_type": (same_type, number_of_type),
    "copy": (first_operand,),
    "slice": (whole_slice,),
    "add": (commute,),
    "mul": (commute,),
}
