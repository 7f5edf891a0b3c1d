"""Which values differ between lanes: flags spread along the dataflow, through loops and branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    if eqn.primitive.name not in J.REGIONS:
        return [any(flags)] * len(eqn.outvars)
    inside = flags_inside(eqn, flags)
    if eqn.primitive.name != "scan":
        return inside.varies
    ys = mark(J.as_scan(eqn).body, inside.regions[0])[1][len(inside.varies) :]
    return inside.varies + ys


@dataclass(frozen=True)
class Inside:
    """How flags spread inside control flow."""

    regions: list[list[bool]]  # of the arguments of each region, in all iterations
    varies: list[bool]  # of the carry (scan, while) or the results (cond)
    decides: bool = False  # of the index of a cond, or of the predicate of a while


def flags_inside(eqn: J.Eqn, flags: Sequence[bool]) -> Inside:
    """The flags of a scan, while or cond, from those of its operands."""
    match eqn.primitive.name:
        case "scan":
            scan = J.as_scan(eqn)
            c, n = len(scan.consts), len(scan.init)
            carry = mark_carry(scan.body, flags[:c], flags[c : c + n], flags[c + n :])
            return Inside([[*flags[:c], *carry, *flags[c + n :]]], carry)
        case "while":
            loop = J.as_while(eqn)
            c, b = len(loop.cond_consts), len(loop.body_consts)
            carry = mark_carry(loop.body, flags[c : c + b], flags[c + b :], ())
            decides = mark(loop.cond, [*flags[:c], *carry])[1][0]
            carry = [True] * len(carry) if decides else carry
            return Inside([[*flags[:c], *carry], [*flags[c : c + b], *carry]], carry, decides)
    branches = J.as_cond(eqn).branches
    results = [mark(branch, flags[1:])[1] for branch in branches]
    varies = [flags[0] or any(column) for column in zip(*results, strict=True)]
    return Inside([list(flags[1:])] * len(branches), varies, flags[0])


def mark_carry(body: ClosedJaxpr, consts: Sequence[bool], init: Sequence[bool], xs: Sequence[bool]) -> list[bool]:
    """The fixed point of a loop's carry flags."""
    carry = list(init)
    while True:
        after = mark(body, [*consts, *carry, *xs])[1][: len(carry)]
        merged = [a or b for a, b in zip(carry, after, strict=True)]
        if merged == carry:
            return carry
        carry = merged
