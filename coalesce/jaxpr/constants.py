"""Arrays that a function closes over, out of where JAX keeps them."""

from __future__ import annotations

from typing import Any

from jax.extend.core import ClosedJaxpr, Var

from coalesce.jaxpr.build import close, expand_calls, fresh, Splicer
from coalesce.jaxpr.read import Atom, callee, invars


def holds_constants(jaxpr: ClosedJaxpr) -> bool:
    """Whether the jaxpr or a call in it, at any depth, closes over an array."""
    calls = (callee(eqn) for eqn in jaxpr.jaxpr.eqns)
    return bool(jaxpr.consts) or any(called is not None and holds_constants(called) for called in calls)


def separate_consts(jaxpr: ClosedJaxpr) -> tuple[ClosedJaxpr, list[Any]]:
    """(jaxpr with the constants of itself and of its calls as leading arguments, the constants).

    The same object if it has none. An array that is closed over in several places is one constant.
    """
    if not holds_constants(jaxpr):
        return jaxpr, []
    found: dict[int, tuple[Var, Any]] = {}
    splicer, args = Splicer(), invars(jaxpr)

    def const(var: Var, value: Any) -> Var:
        return found.setdefault(id(value), (fresh(var), value))[0]

    arguments: dict[Any, Atom] = dict(zip(args, args, strict=True))
    outs = expand_calls(jaxpr, arguments, None, holds_constants, const, splicer.copy)
    given, values = [var for var, _ in found.values()], [value for _, value in found.values()]
    return close([*given, *args], splicer.eqns, outs), values
