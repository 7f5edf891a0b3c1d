"""Schedules with some of their items changed; what does not change stays the same object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from coalesce.bundle import Attention, Item, JointLoop, JointStep, Loop, Pack, Schedule


def map_schedule(schedule: Schedule, change: Callable[[Pack | JointStep], Item]) -> Schedule:
    """The schedule with every pack and joint step changed, regions included; the same object if none was."""

    def one(item: Item) -> Item:
        if isinstance(item, Pack | JointStep):
            return change(item)
        return map_bodies(item, lambda body: map_schedule(body, change))

    changed = tuple(map(one, schedule))
    return schedule if same(changed, schedule) else changed


def map_bodies(item: Item, change: Callable[[Schedule], Schedule]) -> Item:
    """The item with the schedule of each of its regions changed, or its packs; the same object if none was."""
    match item:
        case Loop():
            bodies = tuple(map(change, item.bodies))
            return item if same(bodies, item.bodies) else replace(item, bodies=bodies)
        case JointLoop():
            body = change(item.body)
            return item if body is item.body else replace(item, body=body)
        case Attention():
            inside = change(item.inside)
            if same(inside, item.inside):
                return item
            scores, values = (part for part in inside if isinstance(part, Pack))
            return replace(item, scores=scores, values=values)
    return item


def same(new: Sequence[object], old: Sequence[object]) -> bool:
    """Whether both hold the same objects."""
    return len(new) == len(old) and all(a is b for a, b in zip(new, old, strict=True))
