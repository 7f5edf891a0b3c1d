"""Which values lie in padded stacks while a bundle is scheduled, and which equations can run on a stack as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coalesce import jaxpr as J
from coalesce.bundle import Step
from coalesce.joint import joins

Name = tuple[int, Any]  # (family, variable)


@dataclass(frozen=True)
class Stack:
    """Where a value lies: part `index` of the stack of the values `names`."""

    names: tuple[Name, ...]  # one object a stack
    index: int


class Stacks:
    """The stacks of one scope."""

    def __init__(self, rows: Sequence[tuple[Name, ...]] = ()) -> None:
        self.at: dict[Name, Stack] = {}
        for names in rows:
            self.leave(names)

    def leave(self, names: tuple[Name, ...]) -> None:
        """These values lie in one stack from now on."""
        self.at.update((name, Stack(names, i)) for i, name in enumerate(names))

    def are_one(self, names: Sequence[Name]) -> bool:
        """Whether the values are the parts of one stack, in order."""
        return self.begin_one(names) and len(self.at[names[0]].names) == len(names)

    def begin_one(self, names: Sequence[Name]) -> bool:
        """Whether the values are the first parts of one stack, in order."""
        if any(isinstance(var, J.Literal) for _, var in names):
            return False
        first = self.at.get(names[0])
        return first is not None and all(
            (at := self.at.get(name)) is not None and at.names is first.names and at.index == i
            for i, name in enumerate(names)
        )

    def read_by(self, step: Step) -> tuple[int, Stack] | None:
        """The first operand of a step that lies in a stack: (its position, where it lies)."""
        for k, atom in enumerate(step.eqn.invars):
            if not isinstance(atom, J.Literal) and (step.family, atom) in self.at:
                return k, self.at[step.family, atom]
        return None

    def fit(self, steps: Sequence[Step]) -> bool:
        """Whether steps, the first of a joint step, can run as one: each operand is a stack, a weight or a literal of
        every part, or else no larger than what is stacked already."""
        if not joins([step.eqn for step in steps]):
            return False
        largest = loose = 0
        for k, column in enumerate(zip(*(step.eqn.invars for step in steps), strict=True)):
            if isinstance(column[0], J.Literal) or all(step.weights[k] is not None for step in steps):
                continue
            size = sum(J.nbytes(atom.aval) for atom in column)
            if self.begin_one([(step.family, atom) for step, atom in zip(steps, column, strict=True)]):
                largest = max(largest, size)
            else:
                loose += size
        return loose <= largest


def can_join(step: Step) -> bool:
    """Whether a step could be a part of a joint step at all."""
    return not step.each and step.stacks


def alike(step: Step, other: Step) -> bool:
    return other is not step and can_join(other) and joins([step.eqn, other.eqn])
