"""Building jaxprs: closing equations, staging `lax` code, splicing one jaxpr into another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jec
from jax.extend.core import ClosedJaxpr, JaxprEqn as Eqn, Literal, Var
from jax.interpreters import partial_eval as pe

from coalesce.jaxpr.control import REGIONS
from coalesce.jaxpr.read import Atom, callee, is_drop


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
            ins = [read(env, a) for a in eqn.invars]
            new = eqn if like is None else eqn.replace(source_info=like.source_info, ctx=like.ctx)
            outs = self.copy(new, ins)
            env.update((v, o) for v, o in zip(eqn.outvars, outs, strict=True) if not is_drop(v))
        return [read(env, a) for a in jaxpr.jaxpr.outvars]

    def copy(self, eqn: Eqn, ins: Sequence[Atom], inner: Sequence[ClosedJaxpr] = ()) -> list[Var]:
        """Append an equation with other operands, and regions if any are given; returns its results, which are its
        own: two calls of one function hold the same variables."""
        outs = [fresh_out(v) for v in eqn.outvars]
        self.eqns.append(respell(eqn, ins, outs, inner or None))
        return outs


def expand_calls(
    jaxpr: ClosedJaxpr,
    env: dict[Any, Atom],
    stack: Any,
    wanted: Callable[[ClosedJaxpr], bool],
    const: Callable[[Var, Any], Atom],
    put: Callable[[Eqn, Sequence[Atom]], Sequence[Atom]],
) -> list[Atom]:
    """Put the equations of `jaxpr`, whose arguments `env` binds, with calls replaced by what they call.

    Args:
      stack: the callers' name stack, put before each equation's own; None at the top.
      wanted: which callees to expand.
      const: the atom that stands for a constant of an expanded jaxpr.
      put: has an equation that stays with other operands where it goes; returns its results.
    """
    for var, value in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
        env[var] = const(var, value)
    for eqn in jaxpr.jaxpr.eqns:
        ins = [read(env, a) for a in eqn.invars]
        if stack is not None:
            eqn = under(stack, eqn)
        called = callee(eqn)
        if called is not None and wanted(called):
            arguments = dict(zip(called.jaxpr.invars, ins, strict=True))
            outs = expand_calls(called, arguments, eqn.source_info.name_stack, wanted, const, put)
        else:
            outs = put(eqn, ins)
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
