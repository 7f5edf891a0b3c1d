"""Equations of several members that run as one on padded stacks: which can, and how.

Member i's own values lie at the start of each dimension; what lies behind them is padding that nobody reads. A rule
says whether equations of different shapes keep that so, and with which parameters they run at the padded shape.
Equations that are equal, shapes included, need no rule: their batching rule does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coalesce import jaxpr as J
from coalesce.bundle import Bundle, JointStep
from coalesce.lanes import Joint, masked
from coalesce.structure import eqn_key, literal_key, value_key
from coalesce.unify import largest

Eqns = Sequence[J.Eqn]
Shapes = list[tuple[int, ...]]

ELEMENTWISE = frozenset(
    """abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos cosh div eq erf erf_inv erfc exp exp2
    expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow
    reduce_precision rem round rsqrt select_n shift_left shift_right_logical sign sin sinh sqrt square stop_gradient sub
    tan tanh xor""".split()
)


def joins(eqns: Eqns) -> bool:
    """Whether the equations can run as one, whatever their operands are."""
    first = eqns[0]
    if len({eqn.primitive.name for eqn in eqns}) > 1 or len({J.context_key(eqn) for eqn in eqns}) > 1:
        return False
    if any(J.is_key(a.aval) for a in [*first.invars, *first.outvars]) or first.effects or J.regions(first):
        return False
    if len({tuple((isinstance(a, J.Literal), J.dtype(a)) for a in eqn.invars) for eqn in eqns}) > 1:
        return False
    if equal(eqns):
        return True
    return ranks_agree(eqns) and (keeps_boxes(eqns) or moves_apart(eqns))


def keeps_boxes(eqns: Eqns) -> bool:
    """Whether the equations, run at the padded shape, leave each part's own values at the start of each dimension."""
    rule = RULES.get(eqns[0].primitive.name)
    return rule is not None and rule.joins(eqns)


def moves_apart(eqns: Eqns) -> bool:
    """Whether parts are cut out, moved and stacked again: gates that are cut out of one product begin at other places
    in each part. It is one more copy, fused with what reads it, and keeps everything after it in one stack."""
    return eqns[0].primitive.name in MOVES and not equal(eqns) and not keeps_boxes(eqns)


def run(eqns: Eqns, args: Sequence[Joint | None]) -> list[Any]:
    """The results for all lanes, each [L, *padded]; None stands for an operand that is a literal in every equation."""
    first = eqns[0]
    rule = RULES.get(first.primitive.name)
    lanes = next(arg for arg in args if arg is not None).lanes
    if rule is not None and rule.reads is not None:
        dims, fill = rule.reads(eqns)
        args = [None if arg is None else masked(arg, dims, fill) for arg in args]
    params = dict(first.params) | (rule.params(eqns) if rule is not None else {})
    values, axes = [], []
    for k, arg in enumerate(args):
        value, axis = (arg.value, 0) if arg is not None else literals([eqn.invars[k] for eqn in eqns], lanes)
        values.append(value)
        axes.append(axis)
    return jax.vmap(lambda *xs: J.bind(first, xs, params), in_axes=tuple(axes))(*values)


def literals(atoms: Sequence[Any], lanes: Sequence[int]) -> tuple[Any, int | None]:
    """The value of a literal operand and its lane axis, None if it is the same in all equations."""
    found = [J.literal_value(atom) for atom in atoms]
    if len({literal_key(atom) for atom in atoms}) == 1:  # by their bits: -0.0 equals 0.0
        return found[0], None
    return jnp.asarray(np.repeat(np.stack([np.asarray(v) for v in found]), lanes, axis=0)), 0


def shapes_of(eqn: J.Eqn) -> Shapes:
    return [J.shape(a) for a in eqn.invars]


def equal(eqns: Eqns) -> bool:
    """Whether the equations are one and the same up to their operands' values."""
    same_operands = all(shapes_of(eqn) == shapes_of(eqns[0]) for eqn in eqns)
    return same_operands and len({eqn_key(eqn) for eqn in eqns}) == 1


def ranks_agree(eqns: Eqns) -> bool:
    ranks = {tuple(len(J.shape(a)) for a in [*eqn.invars, *eqn.outvars]) for eqn in eqns}
    return len(ranks) == 1


def ins(eqns: Eqns, k: int = 0) -> Shapes:
    return [J.shape(eqn.invars[k]) for eqn in eqns]


def outs(eqns: Eqns) -> Shapes:
    return [J.shape(eqn.outvars[0]) for eqn in eqns]


def padded_dims(shapes: Shapes) -> set[int]:
    """The dimensions in which shapes differ."""
    return {d for d, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1}


def same(eqns: Eqns, *names: str) -> bool:
    """Whether the equations agree in these parameters; in all of them if none are named."""
    names = names or tuple(eqns[0].params)
    return all(len({value_key(eqn.params.get(name)) for eqn in eqns}) == 1 for name in names)


@dataclass(frozen=True)
class Rule:
    joins: Callable[[Eqns], bool]  # of equations of one primitive, with operands of the same ranks and dtypes
    params: Callable[[Eqns], dict[str, Any]] = lambda eqns: {}  # what changes at the padded shape
    # the dimensions whose padding is read, and what must be there
    reads: Callable[[Eqns], tuple[Sequence[int], Any]] | None = None


def elementwise(eqns: Eqns) -> bool:
    """In each dimension an operand is whole in all equations, or has one element in all, which counts for the whole."""
    if not same(eqns):
        return False
    for k in range(len(eqns[0].invars)):
        for own, whole in zip(zip(*ins(eqns, k), strict=True), zip(*outs(eqns), strict=True), strict=False):
            if own != whole and set(own) != {1}:
                return False
    return True


def broadcasts(eqns: Eqns) -> bool:
    """Each operand dimension is repeated in all equations or in none."""
    if not same(eqns, "broadcast_dimensions"):
        return False
    dims = eqns[0].params["broadcast_dimensions"]
    repeated = [
        [i == 1 and o[d] > 1 for i, d in zip(shape, dims, strict=True)]
        for shape, o in zip(ins(eqns), outs(eqns), strict=True)
    ]
    kept = [all(column) or not any(column) for column in zip(*repeated, strict=True)]
    return all(kept)


def reshapes(eqns: Eqns) -> bool:
    """Dimensions merge and split in the same way, and only the outermost of those that do is padded."""
    if any(eqn.params.get("dimensions") is not None for eqn in eqns):
        return False
    before, after = (list(zip(*shapes, strict=True)) for shapes in (ins(eqns), outs(eqns)))
    before, after = ([sizes for sizes in dims if set(sizes) != {1}] for dims in (before, after))
    i = j = 0
    while i < len(before) and j < len(after):
        left, right = np.asarray(before[i], object), np.asarray(after[j], object)
        inner: list[Any] = []
        i, j = i + 1, j + 1
        while (left != right).any():
            if i < len(before) and left[0] <= right[0]:
                inner.append(before[i])
                left = left * np.asarray(before[i], object)
                i += 1
            elif j < len(after):
                inner.append(after[j])
                right = right * np.asarray(after[j], object)
                j += 1
            else:
                return False
        if any(len(set(sizes)) > 1 for sizes in inner):
            return False
    return i == len(before) and j == len(after)


def slices(eqns: Eqns) -> bool:
    """A dimension that is padded is taken whole."""
    if not (same(eqns, "start_indices") and same(eqns, "strides")):
        return False
    for d in padded_dims(ins(eqns)) | padded_dims(outs(eqns)):
        for eqn, shape in zip(eqns, ins(eqns), strict=True):
            first, last, strides = (eqn.params[name] for name in ("start_indices", "limit_indices", "strides"))
            if first[d] or last[d] != shape[d] or (strides and strides[d] > 1):
                return False
    return True


def windows(eqns: Eqns) -> bool:
    """Nothing slides along a dimension that is padded."""
    still = {"window_dimensions": 1, "window_strides": 1, "padding": (0, 0), "base_dilation": 1, "window_dilation": 1}
    params = eqns[0].params
    return same(eqns) and all(
        params[name] is None or params[name][d] == rest for d in padded_dims(ins(eqns)) for name, rest in still.items()
    )


def reduction(identity: Callable[[np.dtype], Any]) -> Rule:
    def reads(eqns: Eqns) -> tuple[Sequence[int], Any]:
        axes = tuple(int(axis) for axis in eqns[0].params["axes"])
        return axes, identity(np.dtype(J.dtype(eqns[0].invars[0])))

    def real(eqns: Eqns) -> bool:
        return same(eqns) and not jnp.issubdtype(J.dtype(eqns[0].invars[0]), jnp.complexfloating)

    return Rule(real, reads=reads)


def lowest(dtype: np.dtype) -> Any:
    """No more than any other value: -inf where there is one."""
    if jnp.issubdtype(dtype, jnp.floating):
        return -np.inf if np.isinf(np.asarray(-np.inf, dtype)) else jnp.finfo(dtype).min
    return False if dtype.kind == "b" else jnp.iinfo(dtype).min


def highest(dtype: np.dtype) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return np.inf if np.isinf(np.asarray(np.inf, dtype)) else jnp.finfo(dtype).max
    return True if dtype.kind == "b" else jnp.iinfo(dtype).max


def all_bits(dtype: np.dtype) -> Any:
    return True if dtype.kind == "b" else ~np.zeros((), dtype)


# What only moves elements, and is cheap to do for each part.
MOVES = frozenset({"concatenate", "reshape", "rev", "slice", "split"})

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, Rule(elementwise)),
    "broadcast_in_dim": Rule(broadcasts, lambda eqns: {"shape": largest(outs(eqns))}),
    "reshape": Rule(reshapes, lambda eqns: {"new_sizes": largest(outs(eqns))}),
    "transpose": Rule(same),
    "squeeze": Rule(same),
    "slice": Rule(slices, lambda eqns: {"limit_indices": largest([eqn.params["limit_indices"] for eqn in eqns])}),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), Rule(windows)),
    "reduce_sum": reduction(lambda dtype: 0),
    "reduce_prod": reduction(lambda dtype: 1),
    "reduce_max": reduction(lowest),
    "reduce_min": reduction(highest),
    "reduce_and": reduction(all_bits),
    "reduce_or": reduction(lambda dtype: 0),
}


def rows_of_parts(step: JointStep, operand: int, bundle: Bundle) -> tuple[int, ...]:
    """Which row of its array each lane reads, for an operand that is a weight of each part."""
    rows: list[int] = []
    start = 0
    for part in step.parts:
        family = bundle.families[part.family]
        w = part.weights[operand]
        assert w is not None, f"operand {operand} of the step at {part.site} is no weight"
        rows += [start + row for row in family.rows[w]]
        start += len(family.owners[w])
    return tuple(rows)
