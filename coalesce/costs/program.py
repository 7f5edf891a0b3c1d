"""Microseconds of equations and of whole programs: every heavy op by itself, and light ones as the bytes that they
move, since XLA fuses them. What runs how often is not always known: a while_loop is taken for TRIPS turns, a cond for
the longest of its branches.
"""

from __future__ import annotations

from collections.abc import Iterable

from coalesce import jaxpr as J
from coalesce.costs.model import Costs
from coalesce.heavy import heavy_op, is_heavy

TRIPS = 8


def equations_us(eqns: Iterable[J.Eqn], costs: Costs, lanes: int = 1) -> float:
    return sum((equation_us(eqn, costs, lanes) for eqn in eqns), 0.0)


def equation_us(eqn: J.Eqn, costs: Costs, lanes: int = 1) -> float:
    """One equation of so many lanes, each with weights of its own, in the middle of a program."""
    if is_heavy(eqn):
        return costs.op(heavy_op(eqn), lanes)
    regions = [equations_us(region.jaxpr.eqns, costs, lanes) for region in J.regions(eqn)]
    match eqn.primitive.name:
        case "scan":
            return J.as_scan(eqn).length * (costs.loop + sum(regions))
        case "while":
            return TRIPS * (costs.loop + sum(regions))
        case "cond":
            return max(regions)
    inside = sum(equations_us(sub.jaxpr.eqns, costs, lanes) for sub in J.subjaxprs(eqn))
    moved = sum(J.nbytes(a.aval) for a in [*eqn.invars, *eqn.outvars] if not isinstance(a, J.Literal))
    return inside + costs.move(lanes * moved)
