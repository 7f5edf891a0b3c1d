"""The record of each heavy op: with which families it shares a superkernel, or why with none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from coalesce.bundle import Aligned, Bundle, Loop, Pack, Place, place_of, Schedule
from coalesce.clusters import canonical_gemm, common, Gemm, waste
from coalesce.member import fold
from coalesce.record import Record
from coalesce.weigh import Weighed

Weigh = Callable[[Sequence[Pack]], Weighed | None]
Gemms = Mapping[Gemm, Mapping[int, Place]]  # the first op of each family that is such a product
FOR_LAUNCH = "not padded: it can share a kernel launch as it is, with what runs at the same time"
TRIED = 16  # partners that a reason looks at


def records_of(
    bundle: Bundle,
    aligned: Sequence[Aligned],
    near: Mapping[Place, int],
    weigh: Weigh,
    margin: float,
    for_launch: Callable[[Pack], bool],
    waste_bound: float,
) -> dict[Place, Record]:
    """A record for every pack of the bundle, by its place; `near` numbers those that might share a superkernel,
    `margin` is the share of its parts' time that a pack had to win, and `for_launch` says which stay apart for one."""
    found = dict(scoped(bundle.schedule, ()))
    gemms: dict[Gemm, dict[int, Place]] = {}
    for place, (pack, _) in found.items():
        gemms.setdefault(canonical_gemm(pack.op), {}).setdefault(place[0], place)
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
        apart = differs(pack, place[0], gemms, waste_bound) if not others else ""
        reason = apart or why(others, reachable, pack, weigh, margin, group_of)
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
    tails_us = weighed.stacked_us - weighed.movement_us if group.stacked and weighed.stacked_us else 0.0
    times = (weighed.packed_us, weighed.parts_us, 0.0 if group.stacked else weighed.movement_us, tails_us)
    return Record(alone_us(pack, weigh), "", company, shared.op.shape, max(0.0, waste), *times)


def why(
    others: Sequence[Place],
    reachable: Sequence[Pack],
    pack: Pack,
    weigh: Weigh,
    margin: float,
    group_of: Mapping[Place, Aligned],
) -> str:
    if not others:
        return "no op of another family is within the waste bound of it"
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


def differs(pack: Pack, family: int, gemms: Gemms, waste_bound: float) -> str:
    """An op of another family that only its arithmetic keeps apart."""
    own = canonical_gemm(pack.op)
    for gemm, places in gemms.items():
        where = next((place for other, place in places.items() if other != family), None)
        if where is None or (gemm.form, gemm.context) != (own.form, own.context) or gemm.kind == own.kind:
            continue
        whole = common([own.shape, gemm.shape])
        if max(waste(own.shape, whole), waste(gemm.shape, whole)) <= waste_bound:
            size = "as large" if own.shape == gemm.shape else "near enough in shape"
            return f"precision or dtype differs from that of family {where[0]} at {where[1]}, which is {size}"
    return ""
