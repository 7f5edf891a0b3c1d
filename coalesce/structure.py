"""Structural keys: when two equations, or two programs, are the same up to the names of their variables.

`canonical` walks the dataflow from the outputs, so that the order in which a program was written, its unused arguments
and the order of its arguments do not count: weights and inputs are numbered by first use. Scalar literals are
structure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J

Key = Hashable

# Names and thunks that do not change what an equation computes.
MEANINGLESS = {"name", "linear", "ft_in", "ft_out", "logging_record", "jaxpr_thunk"}


@dataclass(frozen=True)
class Canonical:
    """A jaxpr in the order of its dataflow: equal keys mean equal computations."""

    key: Key
    eqns: tuple[J.Eqn, ...]
    args: tuple[int, ...]  # argument positions in the order of first use


def literal_key(literal: J.Literal) -> Key:
    value = J.literal_value(literal)
    array = np.asarray(jax.random.key_data(value) if J.is_key(literal.aval) else value)
    return ("literal", array.dtype.name, array.shape, array.tobytes())


def constant_key(value: Any, aval: Any) -> Key:
    """Of a closed-over array in what is neither a call nor a region, such as the function of a reduction: `trace` makes
    no weight of it, so it is structure."""
    array = np.asarray(jax.random.key_data(value) if J.is_key(aval) else value)
    return ("constant", array.dtype.name, array.shape, hashlib.blake2b(array.tobytes(), digest_size=16).digest())


def aval_key(aval: Any) -> Key:
    return (aval.shape, str(aval.dtype)) if hasattr(aval, "shape") else str(aval)


def eqn_key(eqn: J.Eqn, literals: bool = True) -> Key:
    """Primitive, parameters, context and result types; everything but the operands."""
    params = tuple((k, value_key(v, literals)) for k, v in sorted(eqn.params.items()) if k not in MEANINGLESS)
    if eqn.primitive.name == "scan":
        scan = J.as_scan(eqn)
        params += (("split", (len(scan.consts), len(scan.init), len(scan.xs))),)
    return (eqn.primitive.name, params, J.context_key(eqn), tuple(aval_key(v.aval) for v in eqn.outvars))


def value_key(value: Any, literals: bool = True) -> Key:
    """A parameter's value, hashable; regions by their structure."""
    if J.is_jaxpr(value):
        return canonical(J.closed(value), positional=True, literals=literals).key
    if isinstance(value, tuple | list):
        return tuple(value_key(v, literals) for v in value)
    if isinstance(value, dict):
        return tuple((k, value_key(v, literals)) for k, v in sorted(value.items()))
    if isinstance(value, np.ndarray | np.generic):
        return (value.dtype.name, value.shape, value.tobytes())
    if isinstance(value, bool | int | float):  # NaN is unlike itself, and -0.0 equals 0.0
        return (type(value).__name__, repr(value))
    try:
        hash(value)
    except TypeError:
        return ("object", id(value))
    return value


def canonical(jaxpr: ClosedJaxpr, n_weights: int = 0, positional: bool = False, literals: bool = True) -> Canonical:
    """Order and key of a jaxpr.

    Args:
      n_weights: how many leading arguments are weights; the rest are inputs, numbered apart.
      positional: arguments keep their positions, as in a region, whose signature its equation fixes.
      literals: False leaves scalar literals' values out, to find what differs in nothing else.
    """
    args = J.invars(jaxpr)
    number: dict[Any, Key] = {v: ("arg", i, aval_key(v.aval)) for i, v in enumerate(args)} if positional else {}
    for var, value in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
        number[var] = constant_key(value, var.aval)
    position = {v: i for i, v in enumerate(args)}
    producer = {v: e for e in jaxpr.jaxpr.eqns for v in e.outvars if not J.is_drop(v)}
    used: list[int] = []
    counts = [0, 0]
    order: list[J.Eqn] = []
    keys: list[Key] = []

    def ref(atom: J.Atom) -> Key:
        if isinstance(atom, J.Literal):
            return literal_key(atom) if literals else ("literal", aval_key(atom.aval))
        if atom not in number:
            kind = position[atom] >= n_weights
            number[atom] = ("iw"[not kind], counts[kind], aval_key(atom.aval))
            counts[kind] += 1
            used.append(position[atom])
        return number[atom]

    def emit(eqn: J.Eqn) -> None:
        operands = tuple(map(ref, eqn.invars))
        for k, var in enumerate(eqn.outvars):
            number[var] = ("eqn", len(order), k)
        order.append(eqn)
        keys.append((eqn_key(eqn, literals), operands))

    done: set[int] = set()
    roots: Iterable[J.Eqn] = [producer[v] for v in J.outvars(jaxpr) if not isinstance(v, J.Literal) and v in producer]
    effects = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.effects]
    for root in [*roots, *effects]:
        stack = [(root, False)]
        while stack:
            eqn, ready = stack.pop()
            if id(eqn) in done:
                continue
            if ready:
                done.add(id(eqn))
                emit(eqn)
                continue
            stack.append((eqn, True))
            operands = [a for a in eqn.invars if not isinstance(a, J.Literal) and a in producer]
            stack.extend((producer[a], False) for a in reversed(operands))
    outs = tuple(map(ref, J.outvars(jaxpr)))
    weak = () if positional else tuple(bool(getattr(v.aval, "weak_type", False)) for v in J.outvars(jaxpr))
    signature = tuple(aval_key(v.aval) for v in args) if positional else ()
    return Canonical((tuple(keys), outs, weak, signature), tuple(order), tuple(used))


class ValueNumbers:
    """Numbers values so that equal numbers mean the same computation on the same arguments, across jaxprs."""

    def __init__(self) -> None:
        self.table: dict[Key, int] = {}
        self.eqn_keys: dict[int, tuple[J.Eqn, Key]] = {}  # by id; the equation is kept, so that the id stays its own

    def number(self, key: Key) -> int:
        return self.table.setdefault(key, len(self.table))

    def of(self, jaxpr: ClosedJaxpr, args: Iterable[Key]) -> list[int]:
        """The numbers of the results of `jaxpr` on arguments with the given keys."""
        env: dict[Any, int] = {v: self.number(("arg", key)) for v, key in zip(J.invars(jaxpr), args, strict=True)}

        def read(atom: J.Atom) -> int:
            return self.number(literal_key(atom)) if isinstance(atom, J.Literal) else env[atom]

        for eqn in jaxpr.jaxpr.eqns:
            if id(eqn) not in self.eqn_keys:
                self.eqn_keys[id(eqn)] = (eqn, eqn_key(eqn))
            operands = tuple(map(read, eqn.invars))
            for k, var in enumerate(eqn.outvars):
                env[var] = self.number((self.eqn_keys[id(eqn)][1], operands, k))
        return [read(atom) for atom in J.outvars(jaxpr)]
