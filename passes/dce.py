"""Drop equations whose results nobody reads.

Before                                  After
    a(%0:f32[4,3] | %1:f32[2,4])            a(%0:f32[4,3] | %1:f32[2,4])
      %2:f32[2,4] = sin %1                    %2:f32[2,3] = dot_general %1 %0
      %3:f32[2,3] = dot_general %1 %0         -> %2
      -> %3

Signatures never change; equations with effects stay. JAX's own rules prune inside scan, while and cond.
"""

from __future__ import annotations

from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.program import Program


def dce(program: Program) -> Program:
    main = live(program.jaxpr)
    prepare = program.prepare and live(program.prepare)
    if main is program.jaxpr and prepare is program.prepare:
        return program
    return program.with_jaxpr(main, prepare)


def live(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    pruned = J.drop_dead(jaxpr)
    return jaxpr if size(pruned) == size(jaxpr) else pruned


def size(jaxpr: ClosedJaxpr) -> int:
    """Equations, operands and results, regions included: elimination never keeps it and changes something."""
    return sum(
        1 + len(eqn.invars) + sum(not J.is_drop(v) for v in eqn.outvars) + sum(map(size, J.subjaxprs(eqn)))
        for eqn in jaxpr.jaxpr.eqns
    )
