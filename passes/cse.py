"""Compute equal things once.

Before                              After
    a(%0:f32[3] | %1:f32[3])            a(%0:f32[3] | %1:f32[3])
      %2:f32[3] = sin %1                  %2:f32[3] = sin %1
      %3:f32[3] = sin %1                  %3:f32[3] = mul %2 %2
      %4:f32[3] = mul %2 %3               -> %3
      -> %4

Two equations are equal if primitive, parameters, context and operands are; literals compare by their bytes. Equations
with effects never merge, nor do callbacks, which the user may count. Broadcasts of a number stay with their readers,
each of which may run in a kernel of its own (fuse_epilogues); what reads equal ones is equal.
"""

from __future__ import annotations

from typing import Any

from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.behaviour import may_merge
from coalesce.program import Program
from coalesce.structure import eqn_key, Key, literal_key


def cse(program: Program) -> Program:
    main = merge(program.jaxpr)
    prepare = program.prepare and merge(program.prepare)
    if main is program.jaxpr and prepare is program.prepare:
        return program
    return program.with_jaxpr(main, prepare)


def merge(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    env: dict[Any, J.Atom] = {}
    number: dict[Any, J.Var] = {}  # of broadcasts of one number, the first
    seen: dict[Key, list[J.Var]] = {}
    eqns: list[J.Eqn] = []
    changed = False
    for eqn in jaxpr.jaxpr.eqns:
        ins = [J.read(env, a) for a in eqn.invars]
        inner = J.regions(eqn)
        merged = tuple(map(merge, inner))
        if any(a is not b for a, b in zip(inner, merged, strict=True)) or any(
            a is not b for a, b in zip(ins, eqn.invars, strict=True)
        ):
            eqn, changed = J.respell(eqn, ins, eqn.outvars, merged or None), True
        if not may_merge(eqn):
            eqns.append(eqn)
            continue
        key = (eqn_key(eqn), tuple(literal_key(a) if isinstance(a, J.Literal) else number.get(a, a) for a in ins))
        first = seen.setdefault(key, eqn.outvars)
        if first is eqn.outvars:
            eqns.append(eqn)
        elif is_number(eqn):
            eqns.append(eqn)
            number[eqn.outvars[0]] = first[0]
        elif any(J.is_drop(f) and not J.is_drop(v) for f, v in zip(first, eqn.outvars, strict=True)):
            eqns.append(eqn)  # the first one threw away what this one is read for
        else:
            changed = True
            env.update((v, f) for v, f in zip(eqn.outvars, first, strict=True) if not J.is_drop(v))
    return J.close(J.invars(jaxpr), eqns, [J.read(env, a) for a in J.outvars(jaxpr)]) if changed else jaxpr


def is_number(eqn: J.Eqn) -> bool:
    """Whether it is a broadcast of one."""
    return eqn.primitive.name == "broadcast_in_dim" and [J.shape(a) for a in eqn.invars] == [()]
