"""Move work on weights out of the bodies of loops and branches: the first half of `hoist_weights`.

Before                                                After
    %3:f32[8] = scan %0 %1 %2 [length=5 ...]              %3:f32[4,8] = transpose %0
      body(%4:f32[8,4], %5:f32[8], %6:f32[4])             %4:f32[8] = scan %3 %1 %2 [length=5 ...]
        %7:f32[4,8] = transpose %4                          body(%5:f32[4,8], %6:f32[8], %7:f32[4])
        %8:f32[8] = dot_general %6 %7                         %8:f32[8] = dot_general %7 %5
        ...                                                   ...

Only an argument that is the same in every iteration counts as a weight: the constants of scan and while, the operands
of cond. The rule of what is worth moving is `movable`'s. Loops are rebuilt (`J.rebuilt`); their constants stand in the
order of first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.passes.movable import movable
from coalesce.rewrite import depends_on_weights_alone, region_flags


def lift_from_regions(jaxpr: ClosedJaxpr, weight_args: Sequence[bool]) -> ClosedJaxpr:
    """The jaxpr with weight-only work lifted to its top level; the same object if there is none in its regions."""
    known = {v for v, flag in zip(J.invars(jaxpr), weight_args, strict=True) if flag}
    splicer = J.Splicer()
    env: dict[Any, J.Atom] = {}
    for old in jaxpr.jaxpr.eqns:
        ins = [J.read(env, a) for a in old.invars]
        eqn = old if all(a is b for a, b in zip(ins, old.invars, strict=True)) else J.respell(old, ins, old.outvars)
        start = len(splicer.eqns)
        flags = region_flags(eqn, known)
        results = lift(eqn, flags, splicer) if any(map(any, flags)) else None
        if results is None:
            splicer.eqns.append(eqn)
        else:
            env.update((v, r) for v, r in zip(old.outvars, results, strict=True) if not J.is_drop(v))
        for made in splicer.eqns[start:]:
            if depends_on_weights_alone(made, known):
                known.update(v for v in made.outvars if not J.is_drop(v))
    if len(splicer.eqns) == len(jaxpr.jaxpr.eqns) and not env:
        return jaxpr
    return J.close(J.invars(jaxpr), splicer.eqns, [J.read(env, a) for a in J.outvars(jaxpr)])


def lift(eqn: J.Eqn, flags: Sequence[Sequence[bool]], splicer: J.Splicer) -> list[J.Atom] | None:
    """Emit the lifted work and the rebuilt equation; None if nothing moves."""
    shells = [Shell(r, f) for r, f in zip(J.regions(eqn), flags, strict=True)]
    if not any(shell.lifted for shell in shells):
        return None
    operands = [atoms[:n] for atoms, n in J.region_operands(eqn)]
    fixed = [shell.emit(splicer, own) for shell, own in zip(shells, operands, strict=True)]
    loop, args = J.rebuilt(eqn, fixed, [shell.body for shell in shells])
    return splicer.inline(loop, args, like=eqn)


class Shell:
    """A region without its weight-only work: `body` takes the loop-invariant values that it needs, then the rest."""

    def __init__(self, region: ClosedJaxpr, flags: Sequence[bool]) -> None:
        region = lift_from_regions(region, flags)  # inner loops first, so that their work can leave both
        args = J.invars(region)
        weights = [v for v, flag in zip(args, flags, strict=True) if flag]
        moved = movable(region, weights, speculative=True)
        eqns = region.jaxpr.eqns
        stay = [e for e in eqns if id(e) not in moved.eqns]
        dead = moved.dead(stay, J.outvars(region))
        stay = [e for e in stay if id(e) not in dead]
        self.lifted = bool(moved.eqns)
        self.flags = flags
        fixed = {*weights, *moved.results}
        atoms = [a for e in stay for a in e.invars] + J.outvars(region)
        self.fixed = list(dict.fromkeys(a for a in atoms if not isinstance(a, J.Literal) and a in fixed))
        variable = [v for v, flag in zip(args, flags, strict=True) if not flag]
        self.body = J.close([*self.fixed, *variable], stay, J.outvars(region))
        self.before = J.close(weights, [e for e in eqns if id(e) in moved.eqns or id(e) in moved.copied], self.fixed)

    def emit(self, splicer: J.Splicer, operands: Sequence[J.Atom]) -> list[J.Atom]:
        """Emit the lifted work outside, on the loop-invariant operands; returns the operands `body` takes for them."""
        paired = list(zip(operands, self.flags, strict=False))
        fixed = splicer.inline(self.before, [a for a, flag in paired if flag])
        return [*fixed, *(a for a, flag in paired if not flag)]
