"""Whether a schedule can run: every equation once, after what it reads. The driver asks after every pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from coalesce import jaxpr as J
from coalesce.bundle import (
    Attention,
    Bundle,
    equations,
    Item,
    JointLoop,
    Loop,
    Pack,
    packs,
    place_of,
    Rowwise,
    Schedule,
    units,
)
from coalesce.errors import IRError

Name = tuple[int, J.Var]  # (family, variable)


def check_bundle(bundle: Bundle) -> None:
    """Raise IRError unless every family's equations are scheduled exactly once, after what they read."""
    scopes = [(f, J.invars(fam.jaxpr), fam.jaxpr) for f, fam in enumerate(bundle.families)]
    check_schedule(bundle.schedule, scopes)
    numbers = sorted(pack.index for pack in packs(bundle.schedule))
    if numbers != list(range(len(numbers))):
        raise IRError(f"packs are numbered {numbers}")
    ends = {0, *accumulate(len(unit) for unit in units(bundle.schedule))}
    if bundle.starts[0] or list(bundle.starts) != sorted({*bundle.starts} & ends - {len(bundle.schedule) or -1}):
        raise IRError(f"executables begin at {bundle.starts}, of a schedule of {len(bundle.schedule)} items")


def check_schedule(schedule: Schedule, scopes: Sequence[tuple[int, list[J.Var], object]]) -> None:
    bound = {(f, v) for f, args, _ in scopes for v in args}
    want = {(f, id(eqn)): eqn for f, _, jaxpr in scopes for eqn in jaxpr.jaxpr.eqns}  # type: ignore[attr-defined]
    for unit in units(schedule):
        if isinstance(first := unit[0], Pack) and first.launch not in (None, first.index):
            raise IRError(f"pack {first.index} is in launch {first.launch}, whose packs stand apart or are misnumbered")
        left: set[Name] = set()  # packs of one launch see nothing of each other, unless they are chained
        inner: set[Name] = set()
        for item in unit:
            chained = isinstance(item, Pack) and item.chained
            made = check_item(item, bound | left if chained else bound, want)
            left |= made
            inner |= made if isinstance(item, Pack) and item.inner else set()
        bound |= left - inner
    if want:
        names = sorted(eqn.primitive.name for eqn in want.values())
        raise IRError(f"never scheduled: {', '.join(names)}")
    for f, _, jaxpr in scopes:
        if any(not isinstance(v, J.Literal) and (f, v) not in bound for v in jaxpr.jaxpr.outvars):  # type: ignore[attr-defined]
            raise IRError(f"family {f}: a result of the program is inside an epilogue, which does not leave it")


def check_item(item: Item, bound: set[Name], want: dict[tuple[int, int], J.Eqn]) -> set[Name]:
    """What an item leaves bound, from what is `bound` before it; takes what it runs from `want`."""
    together = reading_nothing_inside(item)
    inside: set[Name] = set()  # of what it computes; `bound` is large, and is never copied
    for i, (f, eqn) in enumerate(equations(item)):
        if want.pop((f, id(eqn)), None) is None:
            raise IRError(f"family {f}: {eqn.primitive.name} is scheduled twice or is not of this scope")
        # Members of a pack see nothing of each other, what else its kernel runs sees what came before; only its results
        # are left.
        for atom in eqn.invars:
            if isinstance(atom, J.Literal) or (f, atom) in bound or (i >= together and (f, atom) in inside):
                continue
            raise IRError(f"family {f}: {eqn.primitive.name} runs before what it reads")
        inside |= {(f, v) for v in eqn.outvars}
    left = leaves(item)
    if not left <= inside - bound or (isinstance(item, Pack | Rowwise) and not left):
        raise IRError(f"{place_of(item)}: it leaves nothing, or what it does not compute")
    if isinstance(item, JointLoop):
        inner = [(part.family, J.as_scan(part.eqn).body) for part in item.parts]
        check_schedule(item.body, [(f, J.invars(body), body) for f, body in inner])
    if isinstance(item, Loop):
        if len(item.bodies) != len(J.regions(item.eqn)):
            raise IRError(f"family {item.family}: {item.eqn.primitive.name} has {len(item.bodies)} scheduled regions")
        for body, region in zip(item.bodies, J.regions(item.eqn), strict=True):
            check_schedule(body, [(item.family, J.invars(region), region)])
    return left


def leaves(item: Item) -> set[Name]:
    """What others may read of an item."""
    match item:
        case Pack(epilogue=(_, *_), results=results):
            return {(item.members[0].family, v) for v in results}
        case Attention():
            return {(f, v) for f, eqn in equations(item)[-1:] for v in eqn.outvars}
        case Rowwise(inside, results, rounded):
            return {(inside[0].family, v) for v in (*results, *rounded)}
    return {(f, v) for f, eqn in equations(item) for v in eqn.outvars}


def reading_nothing_inside(item: Item) -> int:
    """How many of an item's equations, the first ones, see nothing of the others."""
    match item:
        case Pack():
            return len(item.members)
        case Attention():
            return 1
        case Rowwise():
            return 0
    return len(equations(item))
