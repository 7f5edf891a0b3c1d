"""Run a scan for some lanes after the others, where the weights of all lanes would not stay in the device's cache.

Before                                                After, where a step reads 67 MB of weights
    f0: %5 = scan %1 %2 %4 [length=25 ...], unrolled      f0: %5 = scan ..., unrolled, in 2 shifts of lanes

Every step reads the same weights. As long as those of all lanes fit the cache they come out of the memory once; with a
few lanes more each step fetches all of them again, which is slower. So lanes work in as few shifts of one size as make
the weights of one fit, and a shift runs all steps before the next one begins: what compilers of loops call cache
blocking (M. E. Wolf and M. S. Lam, "A data locality optimizing algorithm", 1991). 32 LSTMs in float32 take 738 us on an
H200 instead of 974, 23 each as 8 of them do. Where a step is short with no more lanes than a shift has, it is no loop
any more (`unroll_loops`). Relies on: the kernels of packs are chosen. Gives: packs inside read the weights of their
lanes by rows of an array, so that a shift reads its own in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coalesce import jaxpr as J
from coalesce.bundle import Bundle, Item, Loop, Pack, packs
from coalesce.costs import Costs
from coalesce.costs.schedule import stretches
from coalesce.family import Family
from coalesce.kernels import FUSING
from coalesce.passes.join_arrays import SMALL_ROW
from coalesce.passes.plan_layouts import read_by
from coalesce.passes.unroll_loops import pays, size
from coalesce.reschedule import same
from coalesce.weigh import nbytes

FEWEST = 2  # lanes of a shift: one alone is no stack
MOST = 8000  # equations of all steps of all shifts: 8 shifts of LSTMs of 25 steps have 4,200, made in 2 s
STREAM = 0.9  # of the memory's rate, that products of one row reach


def run_in_shifts(bundle: Bundle, *, costs: Costs, unroll: bool = True) -> Bundle:
    """Scans at the top of the schedule: one inside another loop begins anew in each of its steps. Unless `unroll` loops
    stay loops."""

    def one(item: Item) -> Item:
        if not isinstance(item, Loop) or item.eqn.primitive.name != "scan":
            return item
        wanted = shifts(item, bundle, costs, unroll)
        if wanted == item.shifts:
            return item
        return replace(item, shifts=wanted, unrolled=is_unrolled(item, bundle, costs, wanted, unroll))

    schedule = tuple(map(one, bundle.schedule))
    return bundle if same(schedule, bundle.schedule) else replace(bundle, schedule=schedule)


def shifts(loop: Loop, bundle: Bundle, costs: Costs, unroll: bool) -> int:
    """As few as make the weights of a shift fit, if that wins; else one."""
    family, device, scan = bundle.families[loop.family], costs.device, J.as_scan(loop.eqn)
    inside = list(packs(loop.bodies[0]))
    members = [member for pack in inside for member in pack.members]
    read = {member.weight: nbytes(member.op.rhs) for member in members if member.weight is not None}
    lane = sum(own for weight, own in read.items() if family.is_own(weight))
    shared = sum(read.values()) - lane
    if scan.length < 2 or lane * family.width + shared <= device.resident_bytes:
        return 1
    count = fewest(family.width, (device.resident_bytes - shared) // lane if lane else 0)
    if count == 1 or not can_part(loop, inside, family):
        return 1
    unrolled = is_unrolled(loop, bundle, costs, count, unroll)
    if unrolled and count * scan.length * size(scan) > MOST:
        return 1
    kernels = sum(stretch.kernels for stretch in stretches(loop.bodies[0], bundle.families, costs))
    slower = 1 / (STREAM * device.memory_gbs) - 1 / device.resident_gbs  # microseconds for 1,000 bytes
    won_us = (scan.length - 1) * lane * family.width * slower / 1e3  # the first step reads them anyway
    step_us = kernels * costs.launch + shared / device.resident_gbs / 1e3
    more_us = (count - 1) * step_us + count * (not unrolled) * costs.loop - (not loop.unrolled) * costs.loop
    return count if won_us > scan.length * more_us else 1


def fewest(lanes: int, fit: int) -> int:
    """Shifts of at most so many lanes, all of one size if there is such a number; one if there are none of FEWEST."""
    if fit < FEWEST:
        return 1
    least, most = -(-lanes // fit), lanes // FEWEST
    equal = [count for count in range(least, most + 1) if lanes % count == 0]
    return equal[0] if equal else least if least <= most else 1


def is_unrolled(loop: Loop, bundle: Bundle, costs: Costs, count: int, unroll: bool) -> bool:
    """Whether it is no loop in so many shifts."""
    return loop.unrolled or (unroll and pays([loop], bundle, costs, count))


def can_part(loop: Loop, inside: Sequence[Pack], family: Family) -> bool:
    """Whether some lanes can run it without a copy of their weights."""
    for pack in inside:
        own = any(member.weight is not None and family.is_own(member.weight) for member in pack.members)
        if own and (pack.kernel not in FUSING or len(pack.members) > 1):
            return False
    weights = {var: w for w, var in enumerate(family.weights)}
    read = {weights[a] for a in loop.eqn.invars if not isinstance(a, J.Literal) and a in weights}
    if any(not family.is_own(w) and len(set(family.rows[w])) > 1 for w in read):
        return False
    copied = {weights[a] for a in read_as_values(loop) if not isinstance(a, J.Literal) and a in weights}
    return not any(family.is_own(w) and J.nbytes(family.weights[w].aval) > SMALL_ROW for w in copied)


def read_as_values(loop: Loop) -> list[J.Atom]:
    """What it begins with, and what each of its steps reads otherwise than by the array of a pack. Of what it scans
    over a step reads no more than its own."""
    scan = J.as_scan(loop.eqn)
    inside = read_by(loop.bodies[0], loop.family, J.outvars(scan.body))
    consts = zip(scan.consts, J.invars(scan.body), strict=False)
    return [*scan.init, *(atom for atom, arg in consts if arg in inside)]
