"""Which programs of a schedule know nothing of each other: its components, and the order in which they run best.

Families that share a pack, a joint step, a joint loop or a launch are of one component, and so are those that share one
with a family of it. Between two components there is no order: each may run as a whole before the other begins. Then the
host launches them one after the other, as the device runs them, which is a flow shop of two machines. S. M. Johnson's
rule (1954) gives the order in which the last has run the soonest: first those that run for longer than they take to
launch, beginning with the one that is launched soonest; then the others, ending with the one that runs the shortest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from coalesce.bundle import equations, Item, Schedule, units

Families = tuple[int, ...]


class Component(NamedTuple):
    families: Families
    schedule: Schedule


class Job(NamedTuple):
    """What runs as a whole."""

    launch_us: float  # of the host
    run_us: float  # of the device


def components(schedule: Schedule) -> list[Component]:
    """In the order in which they begin; each keeps its own."""
    home = connected([families_of(unit) for unit in units(schedule)])
    items: dict[Families, list[Item]] = {}
    for item in schedule:
        items.setdefault(home[families_of([item])[0]], []).append(item)
    return [Component(families, tuple(own)) for families, own in items.items()]


def families_of(unit: Sequence[Item]) -> Families:
    return tuple(dict.fromkeys(f for item in unit for f, _ in equations(item)))


def connected(groups: Sequence[Families]) -> dict[int, Families]:
    """For each family, all of its component, in order."""
    home: dict[int, Families] = {}
    for group in groups:
        whole = tuple(sorted({f for own in group for f in home.get(own, (own,))}))
        if home.get(group[0]) != whole:
            home.update(dict.fromkeys(whole, whole))
    return home


def best_order(jobs: Sequence[Job]) -> list[int]:
    """Johnson's rule: the jobs by number. Those that are alike stay in their order."""

    def place(number: int) -> tuple[bool, float]:
        launch_us, run_us = jobs[number]
        return (False, launch_us) if launch_us < run_us else (True, -run_us)

    return sorted(range(len(jobs)), key=place)
