"""What the items of a schedule cost, the way the passes left them: on the device, and on the host that launches them.

A schedule is taken in stretches, each a heavy item, or those of one launch, and the light steps up to the next. Of
light steps between two heavy ones XLA makes few kernels, which read what was there before and write what is left: one
for each family, and one more for each reduction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from coalesce import jaxpr as J
from coalesce.bundle import Attention, Item, JointLoop, JointStep, Loop, Pack, problems, Rowwise, Schedule, Step, units
from coalesce.costs.model import Costs
from coalesce.costs.program import equation_us, TRIPS
from coalesce.family import Family

# What moves no byte, or is part of whatever reads it.
FREE = frozenset({"broadcast_in_dim", "copy", "expand_dims", "iota", "reshape", "squeeze", "stop_gradient"})

# Light, and a kernel of their own.
REDUCTIONS = ("reduce_", "arg", "cum", "sort", "scatter")


class Stretch(NamedTuple):
    """Items of a schedule, from `start` on."""

    start: int
    us: float  # on the device
    kernels: int
    launch_us: float  # of the host
    graph: bool = True  # whether all of it is part of the program's CUDA graphs; else one ends where it begins
    reads: int = 0  # arguments of the program, before all of it: those that no stretch before reads


def stretches(schedule: Schedule, families: Sequence[Family], costs: Costs) -> list[Stretch]:
    found: list[Stretch] = []
    for start, heavy, light in parted(schedule):
        kernels, us = light_work(light, families, costs)
        graph = all(map(in_graph, heavy))
        if heavy:
            kernels += sum(map(count, heavy)) if heavy[0] is heavy[-1] else 1
            us += heavy_us(heavy, families, costs)
        own = costs.device.graph_us if graph else costs.device.single_us
        found.append(Stretch(start, us, kernels, own * kernels, graph))
    return found


def schedule_us(schedule: Schedule, families: Sequence[Family], costs: Costs) -> float:
    return sum((stretch.us for stretch in stretches(schedule, families, costs)), 0.0)


def parted(schedule: Schedule) -> Iterator[tuple[int, tuple[Item, ...], list[Step | JointStep]]]:
    """(where it begins, its heavy unit, its light steps) of each stretch; light steps come before what is heavy in the
    first alone."""
    start = at = 0
    heavy: tuple[Item, ...] = ()
    light: list[Step | JointStep] = []
    for unit in units(schedule):
        if isinstance(item := unit[0], Step | JointStep) and is_light(item):
            light.append(item)
        else:
            if heavy:
                yield start, heavy, light
                start, light = at, []
            heavy = unit
        at += len(unit)
    if heavy or light:
        yield start, heavy, light


def is_light(item: Step | JointStep) -> bool:
    if isinstance(item, JointStep):
        return True
    return not (item.each or item.alone or J.regions(item.eqn))


def in_graph(item: Item) -> bool:
    """Whether XLA records it in a CUDA graph. A convolution of the vendor's library it does where its options say so,
    which are not known here: it counts as one that is, since a launch too many costs less than one that hides nothing.
    """
    match item:
        case Loop() | JointLoop():
            return item.unrolled and all(in_graph(inner) for body in bodies_of(item) for inner in body)
        case Step():
            return is_light(item)
    return True


def bodies_of(item: Loop | JointLoop) -> tuple[Schedule, ...]:
    return item.bodies if isinstance(item, Loop) else (item.body,)


def turns(item: Loop | JointLoop) -> int:
    if isinstance(item, JointLoop):
        return item.length
    if item.eqn.primitive.name == "scan":
        return J.as_scan(item.eqn).length
    return TRIPS if item.eqn.primitive.name == "while" else 1


def count(item: Item) -> int:
    """Kernels of a heavy item."""
    match item:
        case Pack():
            return 2 if item.kernel == "conv_slices" else 1  # patches, and their product
        case Loop() | JointLoop():
            parts = (part for body in bodies_of(item) for part in parted(body))
            a_turn = sum(sum(map(count, heavy)) + kernels_of(light) for _, heavy, light in parts)
            return turns(item) * a_turn * (item.shifts if isinstance(item, Loop) else 1)
    return 1


def heavy_us(unit: Sequence[Item], families: Sequence[Family], costs: Costs) -> float:
    packs = [item for item in unit if isinstance(item, Pack)]
    if any(pack.chained for pack in packs):  # what they read and write less is measured, not modelled
        each = [costs.op(pack.op, *problems(pack, families), kernel=pack.kernel) for pack in packs]
        return sum(each) - costs.launch * (len(packs) - 1)
    if len(packs) > 1:
        return costs.together([(pack.op, *problems(pack, families)) for pack in packs])
    match item := unit[0]:
        case Pack():
            return costs.op(item.op, *problems(item, families), kernel=item.kernel or None)
        case Attention():  # as two products, whose rows' work is in registers
            return sum(heavy_us([pack], families, costs) for pack in (item.scores, item.values))
        case Rowwise():
            return light_work(item.inside, families, costs, kernels=1)[1]
        case Loop() | JointLoop():
            inside = [schedule_us(body, families, costs) for body in bodies_of(item)]
            once = isinstance(item, Loop) and item.eqn.primitive.name == "cond" and not item.decides
            step_us = max(inside) if once else sum(inside)
            # in shifts it takes less, or it would not be in any
            return turns(item) * (step_us + (0.0 if item.unrolled or once else costs.loop))
        case Step(family, _, eqn):
            return equation_us(eqn, costs, families[family].width)
    raise AssertionError(f"{type(item).__name__} is no heavy item")


def light_work(
    steps: Sequence[Step | JointStep], families: Sequence[Family], costs: Costs, kernels: int | None = None
) -> tuple[int, float]:
    """(kernels, microseconds) of light steps in a row; in so many kernels, or in as many as XLA makes of them."""
    made, read, moved = set(), set(), 0
    for family, eqn in equations_of(steps):
        width = families[family].width
        for atom in eqn.invars:
            if isinstance(atom, J.Literal) or (family, atom) in read:
                continue
            read.add((family, atom))
            if (family, atom) not in made:
                moved += width * J.nbytes(atom.aval)
        made.update((family, v) for v in eqn.outvars)
    moved += sum(families[family].width * J.nbytes(v.aval) for family, v in made if (family, v) not in read)
    kernels = kernels_of(steps) if kernels is None else kernels
    return kernels, kernels * costs.launch + costs.move(moved) if kernels else 0.0


def kernels_of(steps: Sequence[Step | JointStep]) -> int:
    work = [step for step in steps if first_of(step).eqn.primitive.name not in FREE]
    reductions = sum(first_of(step).eqn.primitive.name.startswith(REDUCTIONS) for step in work)
    return len({first_of(step).family for step in work}) + reductions


def first_of(step: Step | JointStep) -> Step:
    return step if isinstance(step, Step) else step.parts[0]


def equations_of(steps: Sequence[Step | JointStep]) -> list[tuple[int, J.Eqn]]:
    return [(p.family, p.eqn) for step in steps for p in (step.parts if isinstance(step, JointStep) else (step,))]
