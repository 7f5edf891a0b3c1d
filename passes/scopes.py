"""What a pass that looks at a scope by itself needs: what it leaves to others, and the scopes inside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from coalesce import jaxpr as J
from coalesce.bundle import Bundle, equations, Item, JointLoop, Loop, Schedule
from coalesce.reschedule import same

Name = tuple[int, Any]  # (family, variable)


def left_by(bundle: Bundle) -> set[Name]:
    """The results of the families' programs."""
    return {name for f, family in enumerate(bundle.families) for name in results(f, family.jaxpr)}


def results(family: int, jaxpr: Any) -> set[Name]:
    return {(family, v) for v in J.outvars(jaxpr) if not isinstance(v, J.Literal)}


def with_bodies(loop: Loop | JointLoop, change: Callable[[Schedule, set[Name]], Schedule]) -> Loop | JointLoop:
    """A loop with each region changed, given what that leaves to others; the same object if none was."""
    if isinstance(loop, JointLoop):
        body = change(loop.body, set().union(*(results(part.family, *J.regions(part.eqn)) for part in loop.parts)))
        return loop if body is loop.body else replace(loop, body=body)
    regions = zip(loop.bodies, J.regions(loop.eqn), strict=True)
    bodies = tuple(change(body, results(loop.family, region)) for body, region in regions)
    return loop if same(bodies, loop.bodies) else replace(loop, bodies=bodies)


def names(eqn: J.Eqn) -> list[J.Var]:
    """What an equation reads but literals."""
    return [a for a in eqn.invars if not isinstance(a, J.Literal)]


def makers_and_readers(items: Sequence[Item]) -> tuple[dict[Name, int], dict[Name, list[int]]]:
    """Which item makes each value, and which items read it, by their places; arguments of the scope nobody makes."""
    made: dict[Name, int] = {}
    readers: dict[Name, list[int]] = {}
    for place, item in enumerate(items):
        for f, eqn in equations(item):
            made.update(((f, v), place) for v in eqn.outvars)
            for atom in names(eqn):
                readers.setdefault((f, atom), []).append(place)
    return made, readers
