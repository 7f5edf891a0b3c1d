"""The order in which the items of a scope can run, one after the other, whatever is chosen to run next."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from coalesce import jaxpr as J
from coalesce.bundle import equations, Item, JointStep, Step
from coalesce.passes.interleave import progress


class RunOrder:
    """What can run of a scope, given what was issued so far."""

    def __init__(self, scope: Sequence[Item]) -> None:
        self.scope = scope
        self.number = {id(item): i for i, item in enumerate(scope)}
        self.progress = progress(scope)
        maker = {(f, v): i for i, item in enumerate(scope) for f, eqn in equations(item) for v in eqn.outvars}
        self.after: list[list[int]] = [[] for _ in scope]
        self.missing = [0] * len(scope)
        self.light: list[int] = []  # steps that are ready: a heap
        self.heavy: list[Item] = []  # packs and loops that are
        for i, item in enumerate(scope):
            read = {(f, a) for f, eqn in equations(item) for a in eqn.invars if not isinstance(a, J.Literal)}
            made = {maker[name] for name in read if name in maker} - {i}
            self.missing[i] = len(made)
            for earlier in made:
                self.after[earlier].append(i)
            if not made:
                self.ready(i)

    def ready(self, i: int) -> None:
        if isinstance(self.scope[i], Step | JointStep):
            heappush(self.light, i)
        else:
            self.heavy.append(self.scope[i])

    def first(self) -> Item | None:
        """What to run next: a step, or else the pack or loop that is least far into its family."""
        if self.light:
            return self.scope[self.light[0]]
        return min(self.heavy, key=lambda item: (self.progress[id(item)], self.number[id(item)]), default=None)

    def issue(self, item: Item) -> None:
        i = self.number[id(item)]
        if self.light and self.light[0] == i:
            heappop(self.light)
        else:
            self.heavy.remove(item)
        for later in self.after[i]:
            self.missing[later] -= 1
            if not self.missing[later]:
                self.ready(later)
