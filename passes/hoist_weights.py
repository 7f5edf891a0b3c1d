"""Move what depends on weights alone into `prepare(params)`, which runs once a tenant, not once a request.

Before                                            After
    a(%0:f32[3], %1:f32[3] | %2:f32[9,3])             a(%0:f32[3] | %1:f32[9,3])
      %3:f32[3] = add %0 1e-05                          %2:f32[9,3] = broadcast_in_dim %0
      %4:f32[3] = rsqrt %3                              %3:f32[9,3] = mul %1 %2
      %5:f32[3] = mul %4 %1                             -> %3
      %6:f32[9,3] = broadcast_in_dim %5               prepare(%0:f32[3], %1:f32[3] | )
      %7:f32[9,3] = mul %2 %6                           %2:f32[3] = add %0 1e-05
      -> %7                                             %3:f32[3] = rsqrt %2
                                                        %4:f32[3] = mul %3 %1
                                                        -> %4

Batch-norm scales, casts, transposes and layout changes of weights go this way, each in the dtype the tenant computes it
in. A value that is larger than the weights it reads and feeds no heavy op stays: broadcasts, iotas and widening casts
are cheaper to compute than to keep. So do values of no weight at all, PRNG keys, and callbacks. Work on weights inside
scan, while and cond leaves the region first. Gives: `prepare` is set, every weight of the program is read, and the
program's weights stand in the order of their first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.passes.lift_from_regions import lift_from_regions
from coalesce.passes.movable import movable
from coalesce.program import Program


def hoist_weights(program: Program) -> Program:
    n = program.n_weights
    main = lift_from_regions(program.jaxpr, [i < n for i in range(len(program.jaxpr.jaxpr.invars))])
    args = J.invars(main)
    weights, inputs = args[:n], args[n:]
    moved = movable(main, weights)
    stay = [eqn for eqn in main.jaxpr.eqns if id(eqn) not in moved.eqns]
    kept = first_uses(stay, J.outvars(main), {*weights, *moved.results})
    if main is program.jaxpr and not moved.results and program.prepare is not None and kept == weights:
        return program
    prepare = extend(
        program, weights, [e for e in main.jaxpr.eqns if id(e) in moved.eqns or id(e) in moved.copied], kept
    )
    dead = moved.dead(stay, J.outvars(main))
    rest = [eqn for eqn in stay if id(eqn) not in dead]
    return program.with_jaxpr(J.close([*kept, *inputs], rest, J.outvars(main)), prepare)


def first_uses(eqns: Sequence[J.Eqn], outs: Sequence[J.Atom], among: set[Any]) -> list[J.Var]:
    """The variables of `among` in the order in which equations and outputs read them."""
    found: dict[Any, None] = {}
    for atom in [a for eqn in eqns for a in eqn.invars] + list(outs):
        if not isinstance(atom, J.Literal) and atom in among:
            found[atom] = None
    return list(found)


def extend(program: Program, weights: Sequence[J.Var], eqns: Sequence[J.Eqn], results: Sequence[J.Var]) -> ClosedJaxpr:
    """The prepare program, followed by `eqns` on its results (or on the raw weights)."""
    if program.prepare is None:
        return J.close(weights, eqns, results, "prepare")
    splicer = J.Splicer()
    raw = [J.fresh(v) for v in J.invars(program.prepare)]
    before = splicer.inline(program.prepare, raw)
    after = splicer.inline(J.close(weights, eqns, results), before)
    return J.close(raw, splicer.eqns, after, "prepare")
