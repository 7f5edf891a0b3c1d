"""What a schedule takes on a device that runs independent kernels at once, as branches of one CUDA graph.

Kernels of one family follow one another. Those of several run side by side, but for what they share. Two things hold a
round up:

    chain     the family that takes longest, with its waits for others at what they share
    filled    the sum over all kernels of their time, each times the share of the device that it keeps busy

Where one of them is much the longer, the round takes that long; where they are alike, kernels find the device busy when
their turn comes: so it is taken for the root of the sum of their squares. A kernel keeps busy as many cores as it has
tiles, and the memory with what it reads and writes. Measured on an H200 beside one program a model, with the prediction
in parentheses: two ResNets 1.37 (1.32) times as fast in a row, three vision models 1.36 (1.64), two BERTs 1.18 (1.14).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from typing import NamedTuple

from coalesce.bundle import (
    Attention,
    equations,
    Item,
    JointLoop,
    JointStep,
    Loop,
    Pack,
    problems,
    Schedule,
    Step,
    units,
)
from coalesce.costs.arithmetic import rate
from coalesce.costs.model import Costs
from coalesce.costs.product import tiles_of
from coalesce.costs.schedule import bodies_of, heavy_us, is_light, light_work, turns
from coalesce.costs.superkernels import nbytes
from coalesce.family import Family

MEET_US = 2.0  # an estimate: branches of a graph that meet, at a kernel of families that were apart


class Beside(NamedTuple):
    chain_us: float
    filled_us: float
    turns_us: float  # all kernels one after the other

    @property
    def us(self) -> float:
        return min(hypot(self.chain_us, self.filled_us), self.turns_us)


def beside(schedule: Schedule, families: Sequence[Family], costs: Costs) -> Beside:
    clocks = Clocks(families, costs)
    waiting: list[Step | JointStep] = []  # light steps, which XLA fuses with others of their family
    for unit in units(schedule):
        if isinstance(item := unit[0], Step | JointStep) and is_light(item):
            waiting.append(item)
            continue
        before = reached(waiting, unit)
        clocks.run([step for step in waiting if id(step) in before], unit)
        waiting = [step for step in waiting if id(step) not in before]
    while waiting:
        last = reached(waiting, waiting[-1:])
        clocks.run([step for step in waiting if id(step) in last], ())
        waiting = [step for step in waiting if id(step) not in last]
    return Beside(max(clocks.us, default=0.0), clocks.filled_us, clocks.turns_us)


class Clocks:
    """How far each family is."""

    def __init__(self, families: Sequence[Family], costs: Costs) -> None:
        self.families, self.costs = families, costs
        self.us = [0.0] * len(families)
        self.last = [0] * len(families)  # the run that each was part of
        self.runs = 0
        self.filled_us = self.turns_us = 0.0

    def run(self, light: Sequence[Step | JointStep], heavy: Sequence[Item]) -> None:
        """Light steps, and then what is heavy: one item, or those of one launch."""
        kernels, us = light_work(light, self.families, self.costs)
        self.filled_us += us - kernels * self.costs.launch
        if heavy:
            own_us = heavy_us(heavy, self.families, self.costs)
            us += own_us
            self.filled_us += sum(busy_us(item, own_us / len(heavy), self.families, self.costs) for item in heavy)
        self.turns_us += us
        own = families_of([*light, *heavy])
        self.runs += 1
        us += MEET_US if len({self.last[f] for f in own}) > 1 else 0.0
        end = max(self.us[f] for f in own) + us
        for f in own:
            self.us[f], self.last[f] = end, self.runs


def families_of(items: Sequence[Item]) -> set[int]:
    return {f for item in items for f, _ in equations(item)}


def reached(steps: Sequence[Step | JointStep], last: Sequence[Item]) -> set[int]:
    """Those steps, by id, that stand before the last items in their families, or in those of whom shares one."""
    families, found = families_of(last), set[int]()
    for step in reversed(steps):
        if (own := families_of([step])) & families:
            families |= own
            found.add(id(step))
    return found


def busy_us(item: Item, us: float, families: Sequence[Family], costs: Costs) -> float:
    """What a heavy item of `us` would take if it kept all of the device busy."""
    match item:
        case Pack():
            return max(share(item, families, costs) * (us - costs.launch), traffic_us(item, families, costs))
        case Attention():
            return sum(busy_us(pack, us / 2, families, costs) for pack in (item.scores, item.values))
        case Loop() | JointLoop():
            return turns(item) * sum(beside(body, families, costs).filled_us for body in bodies_of(item))
    return us - costs.launch


def share(pack: Pack, families: Sequence[Family], costs: Costs) -> float:
    """Of the cores that a pack keeps busy, on average. One row is as fast as its weights come in."""
    op, cores = pack.op, costs.device.cores
    groups, rows = problems(pack, families)
    if op.m * rows == 1:
        return 0.0
    batch, m, n = groups * op.batch, rows * op.m, op.n
    if blocks := pack.blocks:
        tiles = batch * -(-m // blocks.m) * -(-n // blocks.n)
    else:
        tiles = tiles_of(costs.device, rate(op, costs.device), batch, m, n, op.k)
    return tiles / (cores * -(-tiles // cores)) if tiles else 0.0


def traffic_us(pack: Pack, families: Sequence[Family], costs: Costs) -> float:
    groups, rows = problems(pack, families)
    moved = groups * rows * (nbytes(pack.op.lhs) + nbytes(pack.op.out))
    return costs.machine.traffic(groups * nbytes(pack.op.rhs), moved)
