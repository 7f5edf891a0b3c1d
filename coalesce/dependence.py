"""Which values differ between lanes: flags spread along the dataflow, through loops and branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J


def mark(jaxpr: ClosedJaxpr, flags: Sequence[bool]) -> tuple[dict[Any, bool], list[bool]]:
    """Spread argument flags along the dataflow: a value is flagged if anything it is computed from is.

    Returns the flag of every variable of the top level, and those of the results.
    """
    marked: dict[Any, bool] = dict(zip(J.invars(jaxpr), flags, strict=True))

    def flag(atom: J.Atom) -> bool:
        return not isinstance(atom, J.Literal) and marked[atom]

    for eqn in jaxpr.jaxpr.eqns:
        marked.update(zip(eqn.outvars, mark_results(eqn, [flag(a) for a in eqn.invars]), strict=True))
    return marked, [flag(a) for a in J.outvars(jaxpr)]


def mark_results(eqn: J.Eqn, flags: Sequence[bool]) -> list[bool]:
    match eqn.primitive.name:
        case "scan":
            scan = J.as_scan(eqn)
            c, n = len(scan.consts), len(scan.init)
            carry = mark_carry(scan.body, flags[:c], flags[c : c + n], flags[c + n :])
            return carry + mark(scan.body, [*flags[:c], *carry, *flags[c + n :]])[1][n:]
        case "while":
            loop = J.as_while(eqn)
            c, b = len(loop.cond_consts), len(loop.body_consts)
            carry = mark_carry(loop.body, flags[c : c + b], flags[c + b :], ())
            predicate = mark(loop.cond, [*flags[:c], *carry])[1][0]
            return [True] * len(carry) if predicate else carry
        case "cond":
            cond = J.as_cond(eqn)
            if flags[0]:
                return [True] * len(eqn.outvars)
            results = [mark(branch, flags[1:])[1] for branch in cond.branches]
            return [any(column) for column in zip(*results, strict=True)]
    return [any(flags)] * len(eqn.outvars)


def mark_carry(body: ClosedJaxpr, consts: Sequence[bool], init: Sequence[bool], xs: Sequence[bool]) -> list[bool]:
    """The fixed point of a loop's carry flags."""
    carry = list(init)
    while True:
        after = mark(body, [*consts, *carry, *xs])[1][: len(carry)]
        merged = [a or b for a, b in zip(carry, after, strict=True)]
        if merged == carry:
            return carry
        carry = merged
