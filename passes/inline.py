"""Replace call-like equations by what they call, so that later passes see one flat program.

Before                                            After
    a( | %0:f32[3])                                   a( | %0:f32[3])
      %1:f32[3] = custom_jvp_call %0 [name=relu]        %1:f32[3] = max %0 0
        call(%2:f32[3])                                 -> %1
          %3:f32[3] = max %2 0
          -> %3
      -> %1

Regions of scan, while and cond stay regions; their bodies are flattened too. Gives: no equation of the program or of a
region is a call. Equations keep their source line, and the name stack of their callers stands before their own.
"""

from __future__ import annotations

from typing import Any

from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.program import Program


def inline(program: Program) -> Program:
    flat = flatten(program.jaxpr)
    return program if flat is program.jaxpr else program.with_jaxpr(flat)


def flatten(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    if not any(J.callee(eqn) is not None for eqn in walk_regions(jaxpr)):
        return jaxpr
    eqns: list[J.Eqn] = []
    args = J.invars(jaxpr)
    outs = go(jaxpr, dict(zip(args, args, strict=True)), eqns, None)
    return J.close(args, eqns, outs)


def walk_regions(jaxpr: ClosedJaxpr):
    for eqn in jaxpr.jaxpr.eqns:
        yield eqn
        for region in J.regions(eqn):
            yield from walk_regions(region)


def go(jaxpr: ClosedJaxpr, env: dict[Any, J.Atom], eqns: list[J.Eqn], stack: Any) -> list[J.Atom]:
    """Append the flat equations of `jaxpr`, whose arguments `env` binds; returns its results."""
    for var, value in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
        env[var] = J.constant(value, var.aval)
    for eqn in jaxpr.jaxpr.eqns:
        ins = [J.read(env, a) for a in eqn.invars]
        if stack is not None:
            eqn = J.under(stack, eqn)
        called = J.callee(eqn)
        if called is not None:
            outs = go(called, dict(zip(J.invars(called), ins, strict=True)), eqns, eqn.source_info.name_stack)
            env.update((v, o) for v, o in zip(eqn.outvars, outs, strict=True) if not J.is_drop(v))
            continue
        # Two calls of one function hold the same variables: each copy gets its own.
        outs = [J.fresh_out(v) for v in eqn.outvars]
        inner = J.regions(eqn)
        eqns.append(J.respell(eqn, ins, outs, [flatten(r) for r in inner] if inner else None))
        env.update((v, o) for v, o in zip(eqn.outvars, outs, strict=True) if not J.is_drop(v))
    return [J.read(env, a) for a in J.outvars(jaxpr)]
