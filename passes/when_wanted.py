"""How soon the results of each equation are wanted: what is wanted much later is better not computed at once."""

from __future__ import annotations

from typing import Any

from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.heavy import HEAVY


def when_wanted(jaxpr: ClosedJaxpr) -> list[int]:
    """For each equation, how many heavy ops in a row come before the first that reads its results, through others."""
    eqns = jaxpr.jaxpr.eqns
    heavy = [not J.primitives(eqn).isdisjoint(HEAVY) for eqn in eqns]
    depth: dict[Any, int] = {}
    done: list[int] = []
    for eqn, own in zip(eqns, heavy, strict=True):
        done.append(own + max((depth.get(a, 0) for a in eqn.invars if not isinstance(a, J.Literal)), default=0))
        depth.update(dict.fromkeys(eqn.outvars, done[-1]))
    last = max(done, default=0) + 1
    read: dict[Any, int] = {}
    wanted = [last] * len(eqns)
    for i, eqn in reversed(list(enumerate(eqns))):
        wanted[i] = min((read.get(v, last) for v in eqn.outvars), default=last)
        for a in eqn.invars:
            if not isinstance(a, J.Literal):
                read[a] = min(read.get(a, last), done[i] if heavy[i] else wanted[i])
    return wanted
