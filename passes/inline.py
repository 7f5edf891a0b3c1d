"""Replace call-like equations by what they call, so that later passes see one flat program.

Before                                            After
    a( | %0:f32[3])                                   a( | %0:f32[3])
      %1:f32[3] = custom_jvp_call %0 [name=relu]        %1:f32[3] = max %0 0
        call(%2:f32[3])                                 -> %1
          %3:f32[3] = max %2 0
          -> %3
      -> %1

Regions of scan, while and cond stay regions; their bodies are flattened too. A while under `jax.vmap`, whose predicate
says of each row whether it ends, becomes one with one predicate, and with a body that keeps rows which are done as they
are: what JAX makes of it for XLA. Gives: no equation of the program or of a region is a call, and every loop ends as
one. Equations keep their source line, and the name stack of their callers stands before their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.program import Program


def inline(program: Program) -> Program:
    flat = flatten(program.jaxpr)
    return program if flat is program.jaxpr else program.with_jaxpr(flat)


def flatten(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    if not any(J.callee(eqn) is not None or J.ends_by_row(eqn) for eqn in walk_regions(jaxpr)):
        return jaxpr
    splicer, args = J.Splicer(), J.invars(jaxpr)

    def put(eqn: J.Eqn, ins: Sequence[J.Atom]) -> Sequence[J.Atom]:
        inner = [flatten(region) for region in J.regions(eqn)]
        if not J.ends_by_row(eqn):
            return splicer.copy(eqn, ins, inner)
        own = eqn.replace(invars=list(ins))
        return splicer.inline(*J.rebuilt(own, [atoms[:n] for atoms, n in J.region_operands(own)], inner), like=eqn)

    arguments: dict[Any, J.Atom] = dict(zip(args, args, strict=True))
    outs = J.expand_calls(jaxpr, arguments, None, lambda called: True, in_place, put)
    return J.close(args, splicer.eqns, outs)


def in_place(var: J.Var, value: Any) -> J.Atom:
    """An array that is closed over; of programs that `trace` made none is left, since it makes weights of them."""
    return J.constant(value, var.aval)


def walk_regions(jaxpr: ClosedJaxpr) -> Iterator[J.Eqn]:
    for eqn in jaxpr.jaxpr.eqns:
        yield eqn
        for region in J.regions(eqn):
            yield from walk_regions(region)
