"""Building jaxprs: closing equations, staging `lax` code, splicing one jaxpr into another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jec
from jax.extend.core import ClosedJaxpr, JaxprEqn as Eqn, Literal, Var
from jax.interpreters import partial_eval as pe

from coalesce.jaxpr.control import REGIONS
from coalesce.jaxpr.read import Atom, is_drop


def respell(
    eqn: Eqn, invars: Sequence[Atom], outvars: Sequence[Var], inner: Sequence[ClosedJaxpr] | None = None
) -> Eqn:
    """The equation with other operands and results, and with other regions of the same signatures."""
    if inner is None:
        return eqn.replace(invars=list(invars), outvars=list(outvars))
    params, rest = dict(eqn.params), iter(inner)
    for param in REGIONS[eqn.primitive.name]:
        old = params[param]
        params[param] = tuple(next(rest) for _ in old) if isinstance(old, tuple | list) else next(rest)
    return eqn.replace(invars=list(invars), outvars=list(outvars), params=params)


def close(invars: Sequence[Var], eqns: Sequence[Eqn], outvars: Sequence[Atom], name: str = "program") -> ClosedJaxpr:
    """A closed jaxpr without constants."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns)) if eqns else frozenset()
    args = tuple(f"a{i}" for i in range(len(invars)))
    debug = jec.DebugInfo("jit", name, args, tuple(f"r{i}" for i in range(len(outvars))))
    return ClosedJaxpr(jec.Jaxpr((), list(invars), list(outvars), list(eqns), effects, debug), ())


def stage(fn: Callable[..., Any], *args: Any) -> tuple[ClosedJaxpr, Any]:
    """Trace `fn`; returns its jaxpr and its output structure. Tracing the same `fn` twice is free: JAX caches it."""
    return jax.make_jaxpr(fn, return_shape=True)(*args)


def separate_consts(jaxpr: ClosedJaxpr) -> tuple[ClosedJaxpr, list[Any]]:
    """(jaxpr with its constants as leading arguments, the constants); the same object if it has none."""
    if not jaxpr.consts:
        return jaxpr, []
    inner = jaxpr.jaxpr
    return close([*inner.constvars, *inner.invars], inner.eqns, inner.outvars), list(jaxpr.consts)


def fresh(var: Any) -> Var:
    return Var(var.aval if hasattr(var, "aval") else var)


def fresh_out(var: Var) -> Var:
    return var if is_drop(var) else Var(var.aval)


def constant(value: Any, aval: Any) -> Literal:
    return Literal(value, aval)


class Splicer:
    """Collects equations; inlines whole jaxprs among them under fresh names."""

    def __init__(self) -> None:
        self.eqns: list[Eqn] = []

    def inline(self, jaxpr: ClosedJaxpr, args: Sequence[Atom], like: Eqn | None = None) -> list[Atom]:
        """Append the equations of `jaxpr` applied to `args`; returns its results. `like` lends source, name stack."""
        env: dict[Any, Atom] = dict(zip(jaxpr.jaxpr.invars, args, strict=True))
        for var, value in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
            env[var] = constant(value, var.aval)
        for eqn in jaxpr.jaxpr.eqns:
            outs = [fresh_out(v) for v in eqn.outvars]
            new = respell(eqn, [read(env, a) for a in eqn.invars], outs)
            if like is not None:
                new = new.replace(source_info=like.source_info, ctx=like.ctx)
            self.eqns.append(new)
            env.update((v, o) for v, o in zip(eqn.outvars, outs, strict=True) if not is_drop(v))
        return [read(env, a) for a in jaxpr.jaxpr.outvars]


def read(env: dict[Any, Any], atom: Atom) -> Any:
    return atom if isinstance(atom, Literal) else env.get(atom, atom)


def under(stack: Any, eqn: Eqn) -> Eqn:
    """The equation with a caller's name stack put before its own."""
    info = eqn.source_info
    return eqn.replace(source_info=info.replace(name_stack=stack + info.name_stack))


def drop_dead(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """JAX's own dead-code elimination, arguments kept."""
    inner, _ = pe.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
    return close(inner.invars, inner.eqns, inner.outvars)
