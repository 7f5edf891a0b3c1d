"""What any plan must keep, read off the equations alone: independent of coalesce/packing and of `check_bundle`.

check_plan(bundle, waste_bound)     every equation runs once, after what it reads; what runs as one is independent
                                    and wastes no more than the bound
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from math import prod
from typing import Any

from coalesce import jaxpr as J
from coalesce.bundle import Attention, Bundle, Item, JointLoop, JointStep, Loop, Pack, Rowwise, Schedule, Step
from coalesce.family import Family
from coalesce.heavy import HeavyOp
from coalesce.member import Member

Scope = tuple[int, Any]  # (family, jaxpr) whose equations a schedule runs
Key = tuple[int, int]  # (family, number of an equation in its scope)


def check_plan(bundle: Bundle, waste_bound: float) -> None:
    check_scopes(bundle.schedule, [(f, family.jaxpr) for f, family in enumerate(bundle.families)])
    for pack in all_of(Pack, bundle.schedule):
        if len({m.family for m in pack.members}) > 1:
            for member in pack.members:
                spent = waste(pack, member, bundle.families)
                assert spent <= waste_bound + 1e-9, f"{member.site} of family {member.family} wastes {spent:.1%}"


def check_scopes(schedule: Schedule, scopes: Sequence[Scope]) -> None:
    """One level of a schedule, and the levels inside."""
    number = {id(eqn): (f, i) for f, jaxpr in scopes for i, eqn in enumerate(jaxpr.jaxpr.eqns)}
    level = [[number[id(eqn)] for eqn in equations_of(item)] for item in schedule]
    counts = Counter(key for keys in level for key in keys)
    assert set(counts) == set(number.values()), "an equation is missing"
    assert set(counts.values()) <= {1}, "an equation runs twice"
    before = {key: reads for f, jaxpr in scopes for key, reads in dependencies(f, jaxpr)}
    ran: set[Key] = set()
    check_launches(schedule, level, before)
    for item, keys in zip(schedule, level, strict=True):
        first = len(item.members) if isinstance(item, Pack) else 1 if isinstance(item, Attention) else len(keys)
        first = 0 if isinstance(item, Rowwise) else first
        tail = keys[first:]
        for i, key in enumerate(tail):
            assert before[key] <= ran | set(keys[: len(keys) - len(tail) + i]), f"{key} runs before what it reads"
        keys = keys[: len(keys) - len(tail)]
        for key in keys:
            assert before[key] <= ran, f"{key} runs before what it reads"
            assert not reaches(before, key, set(keys) - {key}), f"{keys} run as one, with a path between them"
        ran |= {*keys, *tail}
    for item in schedule:
        if isinstance(item, JointLoop):
            check_scopes(item.body, [(part.family, J.as_scan(part.eqn).body) for part in item.parts])
        elif isinstance(item, Loop):
            for body, region in zip(item.bodies, J.regions(item.eqn), strict=True):
                check_scopes(body, [(item.family, region)])


def check_launches(schedule: Schedule, level: Sequence[list[Key]], before: dict[Key, set[Key]]) -> None:
    """Packs of one launch stand side by side; no path leads from one to another, but to one that is chained."""
    found: dict[int, list[int]] = {}
    for i, item in enumerate(schedule):
        if isinstance(item, Pack) and item.launch is not None:
            found.setdefault(item.launch, []).append(i)
    for at in found.values():
        assert at == list(range(at[0], at[0] + len(at))), "something stands between packs of one launch"
        for i in at:
            item = schedule[i]
            if isinstance(item, Pack) and item.chained:
                assert reaches(before, level[i][0], {key for j in at if j < i for key in level[j]}) or any(
                    reaches(before, key, {key for j in at if j < i for key in level[j]}) for key in level[i]
                ), "a chained pack reads nothing of its chain"
                continue
            others = {key for j in at if j != i for key in level[j]}
            assert not any(reaches(before, key, others) for key in level[i]), "a launch waits for itself"


def equations_of(item: Item) -> list[J.Eqn]:
    match item:
        case Pack():
            return [m.eqn for m in item.members] + [step.eqn for step in item.epilogue]
        case JointStep() | JointLoop():
            return [part.eqn for part in item.parts]
        case Attention() | Rowwise():
            return [eqn for part in item.inside for eqn in equations_of(part)]
        case Step() | Loop():
            return [item.eqn]


def dependencies(family: int, jaxpr: Any) -> Iterator[tuple[Key, set[Key]]]:
    """Each equation of a scope, and those whose results it reads."""
    maker: dict[Any, Key] = {}
    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        reads = {maker[a] for a in eqn.invars if not isinstance(a, J.Literal) and a in maker}
        maker.update((v, (family, i)) for v in eqn.outvars)
        yield (family, i), reads


def reaches(before: dict[Key, set[Key]], key: Key, targets: set[Key]) -> bool:
    """Whether any of `targets` has to run before `key`."""
    seen, stack = {key}, [key]
    while stack:
        for earlier in before[stack.pop()] - seen:
            seen.add(earlier)
            stack.append(earlier)
    return bool(seen & targets)


def all_of(kind: type, schedule: Schedule) -> Iterator[Any]:
    """Every item of a kind, at any depth."""
    for item in schedule:
        if isinstance(item, kind):
            yield item
        inner = item.bodies if isinstance(item, Loop) else (item.body,) if isinstance(item, JointLoop) else ()
        inner = (item.inside,) if isinstance(item, Attention | Rowwise) else inner
        for body in inner:
            yield from all_of(kind, body)


def waste(pack: Pack, member: Member, families: Sequence[Family]) -> float:
    """The share of what a superkernel multiplies for a member that is not the member's own: padding of its shape, and
    of its problems, which take as many lanes as the one that most lanes share."""
    lanes = problems_of(member, families)
    own = multiplications(member.op)
    if pack.form == "product":  # lanes that share a right operand are rows, or one result
        rows = max(lanes.values()) if member.lhs_varies else 1
        return 1 - own * rows / (pack.op.m * pack.op.n * pack.op.k * member.op.batch)
    everyone = sum((problems_of(m, families) for m in pack.members), Counter[Hashable]())
    places = max(everyone.values())
    spent = sum(count + places - everyone[problem] for problem, count in lanes.items())
    return 1 - member.width * own / (spent * multiplications(pack.op))


def multiplications(op: HeavyOp) -> int:
    if op.kind == "dot":
        contracted = op.params["dimension_numbers"][0][0]
        return prod(op.out.shape) * prod(op.lhs.shape[d] for d in contracted)
    return prod(op.out.shape) * prod(op.rhs.shape[:-1])


def problems_of(member: Member, families: Sequence[Family]) -> Counter[Hashable]:
    """How many lanes of a member multiply by each right operand."""
    if member.weight is not None:
        family = families[member.family]
        return Counter(family.owners[member.weight][row] for row in family.rows[member.weight])
    return Counter((id(member), lane if member.rhs_varies else 0) for lane in range(member.width))
