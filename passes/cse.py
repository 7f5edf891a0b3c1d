"""Compute equal things once.

Before                              After
    a(%0:f32[3] | %1:f32[3])            a(%0:f32[3] | %1:f32[3])
      %2:f32[3] = sin %1                  %2:f32[3] = sin %1
      %3:f32[3] = sin %1                  %3:f32[3] = mul %2 %2
      %4:f32[3] = mul %2 %3               -> %3
      -> %4

Two equations are equal if primitive, parameters, context and operands are; literals compare by their bytes. Equations
with effects never merge, nor do callbacks, which the user may count. A broadcast of a number is no work, and stands
before each of its readers, which may run in kernels of their own (fuse_epilogues).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.behaviour import may_merge
from coalesce.program import Program
from coalesce.reschedule import same
from coalesce.structure import eqn_key, Key, literal_key


def cse(program: Program) -> Program:
    main = merge(program.jaxpr)
    prepare = program.prepare and merge(program.prepare)
    if main is program.jaxpr and prepare is program.prepare:
        return program
    return program.with_jaxpr(main, prepare)


def merge(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    env: dict[Any, J.Atom] = {}
    seen: dict[Key, list[J.Var]] = {}
    numbers = Numbers()
    eqns: list[J.Eqn] = []
    for old in jaxpr.jaxpr.eqns:
        ins = [J.read(env, a) for a in old.invars]
        eqn = respelled(old, ins, tuple(map(merge, J.regions(old))))
        key = (eqn_key(eqn), tuple(literal_key(a) if isinstance(a, J.Literal) else numbers.first(a) for a in ins))
        first = seen.setdefault(key, eqn.outvars) if may_merge(eqn) else eqn.outvars
        if is_number(eqn):
            numbers.add(eqn, first[0])
        elif first is eqn.outvars or any(
            J.is_drop(f) and not J.is_drop(v) for f, v in zip(first, eqn.outvars, strict=True)
        ):  # the first one threw away what this one is read for
            own = numbers.before(ins, eqns)
            eqns.append(eqn if same(own, ins) else J.respell(eqn, own, eqn.outvars))
        else:
            env.update((v, f) for v, f in zip(eqn.outvars, first, strict=True) if not J.is_drop(v))
    outs = numbers.before([J.read(env, a) for a in J.outvars(jaxpr)], eqns)
    if same(eqns, jaxpr.jaxpr.eqns) and same(outs, J.outvars(jaxpr)):
        return jaxpr
    return J.close(J.invars(jaxpr), eqns, outs)


def respelled(eqn: J.Eqn, ins: Sequence[J.Atom], inner: Sequence[ClosedJaxpr]) -> J.Eqn:
    """The same object if nothing is new."""
    if same(ins, eqn.invars) and same(inner, J.regions(eqn)):
        return eqn
    return J.respell(eqn, ins, eqn.outvars, inner or None)


class Numbers:
    """Broadcasts of numbers of one scope, and which of them stand before a reader yet."""

    def __init__(self) -> None:
        self.made: dict[J.Atom, J.Eqn] = {}
        self.firsts: dict[J.Atom, J.Var] = {}  # of those that are equal
        self.placed: set[J.Atom] = set()

    def add(self, eqn: J.Eqn, first: J.Var) -> None:
        (var,) = eqn.outvars
        self.made[var], self.firsts[var] = eqn, first

    def first(self, atom: J.Atom) -> J.Atom:
        return self.firsts.get(atom, atom)

    def before(self, ins: Sequence[J.Atom], eqns: list[J.Eqn]) -> list[J.Atom]:
        """A reader's operands, with a broadcast of its own for those that are one; it stands at the end of `eqns`."""
        own: dict[J.Atom, J.Var] = {}
        for var in ins:
            if isinstance(var, J.Literal) or var not in self.made or self.firsts[var] in own:
                continue
            made = self.made[var]
            if var in self.placed:
                made = J.respell(made, made.invars, [J.fresh(var)])
            self.placed.add(var)
            eqns.append(made)
            own[self.firsts[var]] = made.outvars[0]
        return [a if isinstance(a, J.Literal) else own.get(self.first(a), a) for a in ins]


def is_number(eqn: J.Eqn) -> bool:
    """Whether it is a broadcast of one, to more than one number."""
    is_broadcast = eqn.primitive.name == "broadcast_in_dim" and [J.shape(a) for a in eqn.invars] == [()]
    return is_broadcast and J.shape(eqn.outvars[0]) != ()
