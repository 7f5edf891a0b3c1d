"""The most requests of an instance that can end in time, by integer programming, knowing all that will come.

One device, one run at a time; a run has lanes of one family and takes what its width takes. This is the clairvoyant
optimum: no policy can beat it, and one that must decide before it knows what comes can hardly reach it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ortools.sat.python import cp_model

from coalesce.scheduler.workloads import Arrival
from experiments.policy_instances import Instance, US


@dataclass(frozen=True)
class Optimum:
    """`proven` is False where the time limit ended the search; then there are at most `bound`."""

    in_time: int
    bound: int
    proven: bool


@dataclass(frozen=True)
class Slot:
    """A run that may be made: its variables."""

    used: cp_model.IntVar
    start: cp_model.IntVar
    end: cp_model.IntVar
    interval: cp_model.IntervalVar
    lanes: dict[int, cp_model.IntVar]  # by the number of the request


def solve(instance: Instance, known: int = 0, seconds: float = 60.0) -> Optimum:
    """`known` requests can certainly be done in time: some policy did."""
    if known == len(instance.arrivals):
        return Optimum(known, known, True)
    model = cp_model.CpModel()
    slots: list[Slot] = []
    for family in range(len(instance.lines)):
        slots += slots_of(model, instance, family)
    model.add_no_overlap([slot.interval for slot in slots])
    taken = [[slot.lanes[i] for slot in slots if i in slot.lanes] for i in range(len(instance.arrivals))]
    for own in taken:
        model.add_at_most_one(own)
    served = sum(lane for own in taken for lane in own)
    model.add(served >= known)
    model.maximize(served)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Optimum(known, len(instance.arrivals), False)
    bound = min(len(instance.arrivals), int(solver.best_objective_bound + 1e-6))
    return Optimum(round(solver.objective_value), bound, status == cp_model.OPTIMAL)


def slots_of(model: cp_model.CpModel, instance: Instance, family: int) -> list[Slot]:
    """As many runs as there are requests, in the order of their time."""
    own = {i: a for i, a in enumerate(instance.arrivals) if instance.family(a) == family}
    slots: list[Slot] = []
    for number in range(len(own)):
        slot = slot_of(model, instance, family, own, f"{family}.{number}")
        if slots:
            model.add_implication(slot.used, slots[-1].used)
            model.add(slot.start >= slots[-1].end).only_enforce_if(slot.used)
        slots.append(slot)
    keep_order(model, instance, own, slots)
    return slots


def slot_of(model: cp_model.CpModel, instance: Instance, family: int, own: dict[int, Arrival], name: str) -> Slot:
    last = max(instance.deadline_ns(a) for a in own.values()) // US
    used = model.new_bool_var(f"used {name}")
    start, end = model.new_int_var(0, last, f"start {name}"), model.new_int_var(0, last, f"end {name}")
    widths = {w: model.new_bool_var(f"width {name} {w}") for w in useful(instance.widths, len(own))}
    model.add_exactly_one([*widths.values(), used.negated()])
    takes = sum(instance.lines[family].time(w) // US * chosen for w, chosen in widths.items())
    duration = model.new_int_var(0, last, f"takes {name}")
    model.add(duration == takes)
    interval = model.new_optional_interval_var(start, duration, end, used, f"run {name}")
    lanes = {i: model.new_bool_var(f"lane {name} {i}") for i in own}
    model.add(sum(lanes.values()) <= sum(w * chosen for w, chosen in widths.items()))
    model.add(sum(lanes.values()) >= used)
    for i, arrival in own.items():
        model.add(start >= arrival.time_ns // US).only_enforce_if(lanes[i])
        model.add(end <= instance.deadline_ns(arrival) // US).only_enforce_if(lanes[i])
    return Slot(used, start, end, interval, lanes)


def useful(widths: Collection[int], lanes: int) -> list[int]:
    """Up to the first that holds all."""
    return [w for w in widths if w < lanes] + [w for w in widths if w >= lanes][:1]


def keep_order(model: cp_model.CpModel, instance: Instance, own: dict[int, Arrival], slots: list[Slot]) -> None:
    """Of two requests that are both served, one that came first and is due first need not run after the other."""
    numbers = sorted(own)
    for at, i in enumerate(numbers):
        for j in numbers[at + 1 :]:
            if instance.deadline_ns(own[i]) > instance.deadline_ns(own[j]):
                continue
            for earlier, slot in enumerate(slots):
                for later in slots[earlier + 1 :]:
                    model.add_at_most_one(slot.lanes[j], later.lanes[i])
