"""Arrays that a function closes over, out of where JAX keeps them: in calls, in loops and branches and calls there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, JaxprEqn as Eqn, Var

from coalesce.jaxpr.build import close, expand_calls, fresh, Splicer
from coalesce.jaxpr.control import region_operands, regions
from coalesce.jaxpr.read import Atom, callee, invars
from coalesce.jaxpr.rebuilt import rebuilt


def holds_constants(jaxpr: ClosedJaxpr) -> bool:
    """Whether the jaxpr, or a call, a loop or a branch in it, at any depth, closes over an array."""
    return bool(jaxpr.consts) or any(holds_constants(inner) for eqn in jaxpr.jaxpr.eqns for inner in entered(eqn))


def entered(eqn: Eqn) -> Sequence[ClosedJaxpr]:
    called = callee(eqn)
    return regions(eqn) if called is None else (called,)


def separate_consts(jaxpr: ClosedJaxpr) -> tuple[ClosedJaxpr, list[Any]]:
    """(jaxpr with the constants of itself, of its calls, loops and branches as leading arguments, the constants).

    The same object if it has none. An array that is closed over in several places is one constant. A loop is handed it
    as an operand that stays the same in every step.
    """
    if not holds_constants(jaxpr):
        return jaxpr, []
    found: dict[int, tuple[Var, Any]] = {}
    splicer, args = Splicer(), invars(jaxpr)

    def const(var: Var, value: Any) -> Var:
        return found.setdefault(id(value), (fresh(var), value))[0]

    def put(eqn: Eqn, ins: Sequence[Atom]) -> Sequence[Atom]:
        if not any(map(holds_constants, regions(eqn))):
            return splicer.copy(eqn, ins)
        eqn = eqn.replace(invars=list(ins))
        fixed, inner = [], []
        for region, (atoms, n) in zip(regions(eqn), region_operands(eqn), strict=True):
            own, values = separate_consts(region)
            given = [const(var, value) for var, value in zip(invars(own), values, strict=False)]
            fixed.append([*given, *atoms[:n]])
            inner.append(own)
        loop, operands = rebuilt(eqn, fixed, inner)
        return splicer.inline(loop, operands, like=eqn)

    arguments: dict[Any, Atom] = dict(zip(args, args, strict=True))
    outs = expand_calls(jaxpr, arguments, None, holds_constants, const, put)
    given, values = [var for var, _ in found.values()], [value for _, value in found.values()]
    return close([*given, *args], splicer.eqns, outs), values
