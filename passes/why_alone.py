"""The record of each heavy op: with which families it shares a superkernel, or why with none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from coalesce.bundle import Aligned, Bundle, Loop, Pack, Place, place_of, Schedule
from coalesce.member import fold
from coalesce.record import Record
from coalesce.weigh import Weighed

Weigh = Callable[[Sequence[Pack]], Weighed | None]
FOR_LAUNCH = "not padded: it can share a kernel launch as it is, with what runs at the same time"
TRIED = 16  # partners that a reason looks at


def records_of(
    bundle: Bundle,
    aligned: Sequence[Aligned],
    near: Mapping[Place, int],
    weigh: Weigh,
    margin: float,
    for_launch: Callable[[Pack], bool],
) -> dict[Place, Record]:
    """A record for every pack of the bundle, by its place; `near` numbers those that might share a superkernel,
    `margin` is the share of its parts' time that a pack had to win, and `for_launch` says which stay apart for one."""
    found = dict(scoped(bundle.schedule, ()))
    loops = {place: group.places for group in aligned if group.form == "scan" for place in group.places}
    group_of = {place: group for group in aligned if group.form != "scan" for place in group.places}
    kin: dict[int, list[Place]] = {}
    for place, number in near.items():
        kin.setdefault(number, []).append(place)
    records: dict[Place, Record] = {}
    for place, (pack, scope) in found.items():
        group = group_of.get(place)
        if group is not None:
            records[place] = packed(bundle, pack, [found[p][0] for p in group.places], group, weigh)
            continue
        if for_launch(pack):
            records[place] = Record(alone_us(pack, weigh), FOR_LAUNCH)
            continue
        others = [p for p in kin[near[place]] if p[0] != place[0]]
        reachable = [found[p][0] for p in others if together(scope, found[p][1], loops)]
        reason = why(bundle, pack, others, reachable, weigh, margin, group_of)
        records[place] = Record(alone_us(pack, weigh), reason)
    return records


def scoped(schedule: Schedule, inside: tuple[Place, ...]) -> Iterator[tuple[Place, tuple[Pack, tuple[Place, ...]]]]:
    """Every pack by its place, with the loops around it."""
    for item in schedule:
        if isinstance(item, Pack):
            yield place_of(item), (item, inside)
        elif isinstance(item, Loop):
            for body in item.bodies:
                yield from scoped(body, (*inside, place_of(item)))


def together(a: tuple[Place, ...], b: tuple[Place, ...], loops: dict[Place, tuple[Place, ...]]) -> bool:
    """Whether two ops stand in the same scope: outside of loops, or inside loops that run as one."""
    return len(a) == len(b) and all(y in loops.get(x, ()) for x, y in zip(a, b, strict=True))


def alone_us(pack: Pack, weigh: Weigh) -> float:
    weighed = weigh([pack])
    return weighed.parts_us if weighed is not None else 0.0


def packed(bundle: Bundle, pack: Pack, parts: Sequence[Pack], group: Aligned, weigh: Weigh) -> Record:
    weighed = weigh(sorted(parts, key=lambda part: part.index))
    assert weighed is not None, f"{group.places}: packed, and not legal"
    company = tuple(p for p in group.places if p != place_of(pack))
    shared = weighed.shared
    waste = shared.waste(pack.op, fold(pack.members[0], bundle.families[pack.members[0].family]).per_group)
    times = (weighed.packed_us, weighed.parts_us, 0.0 if group.stacked else weighed.movement_us)
    return Record(alone_us(pack, weigh), "", company, shared.op.shape, max(0.0, waste), *times)


def why(
    bundle: Bundle,
    pack: Pack,
    others: Sequence[Place],
    reachable: Sequence[Pack],
    weigh: Weigh,
    margin: float,
    group_of: Mapping[Place, Aligned],
) -> str:
    if not others:
        return differs(bundle, pack) or "no op of another family is within the waste bound of it"
    if not reachable:
        return "different loop: those within the waste bound of it run in other loops"
    tried = [(weigh(sorted([pack, p], key=lambda part: part.index)), place_of(p)) for p in reachable[:TRIED]]
    legal = [(w.gain_us - margin * w.parts_us, w.gain_us, place) for w, place in tried if w is not None]
    if not legal:
        return "no op of another family can share a kernel with it: its lanes share all operands, or waste too much"
    best, gain, place = max(legal)
    where = f"family {place[0]} at {place[1]}"
    if gain <= 0:
        return f"predicted loss of {-gain:.1f} us with {where}, the best partner"
    if best <= 0:
        return f"predicted gain of {gain:.1f} us with {where}, the best partner: within the cost model's error"
    if place in group_of:
        return f"dependent: {where}, its best partner, runs with others that win more or come in another order"
    return f"dependent: {where}, its best partner, would have to run before and after packs that win more"


def differs(bundle: Bundle, pack: Pack) -> str:
    """An op of another family that only its arithmetic keeps apart."""
    for cluster in bundle.clusters:
        for place in cluster.members:
            if isinstance(place, tuple) and place[0] != place_of(pack)[0]:
                if cluster.shape == (pack.op.m, pack.op.n, pack.op.k):
                    return f"precision or dtype differs from that of family {place[0]} at {place[1]}, which is as large"
    return ""
