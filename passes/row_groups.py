"""Which steps around a reduction of rows run as one with it: elementwise work and reductions on rows of one shape.

A group stands before `limit`, the first item that reads what it computes and is not of it; whatever a step of the group
reads is of the group, or made before that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import Any, Protocol, runtime_checkable

from coalesce import jaxpr as J
from coalesce.bundle import Item, Step
from coalesce.kernels.attention import REDUCTIONS, SAME
from coalesce.kernels.epilogue import runs_on_tiles
from coalesce.passes.scopes import Name, names
from coalesce.passes.tails import not_worth
from coalesce.rowwise import dims_of, keeps_dims, takes_rows

DTYPES = ("float32", "bfloat16", "float16", "bool")


@runtime_checkable
class Scope(Protocol):
    items: Sequence[Item]
    left: set[Name]
    made: dict[Name, int]
    readers: dict[Name, list[int]]
    moved: set[int]

    def there(self, name: Name) -> bool: ...


class Group:
    """Steps that run as one: what they compute, and where they stand."""

    def __init__(self, scope: Scope, place: int, first: Step) -> None:
        self.scope, self.family, self.rows = scope, first.family, J.shape(first.eqn.invars[0])
        self.first, self.places = place, {place}
        self.limit = len(scope.items)

    def able(self, at: int) -> bool:
        """Whether the step at a place can run with the group's rows."""
        item = self.scope.items[at]
        return isinstance(item, Step) and item.family == self.family and runs(item, self.rows)

    def eqn(self, at: int) -> J.Eqn:
        item = self.scope.items[at]
        assert isinstance(item, Step), "a group holds steps"
        return item.eqn

    def reads(self, at: int) -> list[Name]:
        return [(self.family, a) for a in names(self.eqn(at))]

    def gives(self, at: int) -> list[Name]:
        return [(self.family, v) for v in self.eqn(at).outvars]

    def readers(self, at: int) -> list[int]:
        return [r for name in self.gives(at) for r in self.scope.readers.get(name, ())]

    def grow(self) -> bool:
        """False if there can be no such group."""
        self.grow_back()
        self.grow_beside()
        return self.grow_on()

    def grow_back(self) -> None:
        """What the reduction reads, the last of it first: elementwise work on what is there, which nobody else reads
        before the reduction, and casts that widen."""
        waiting = {self.scope.made.get(name, -1) for name in self.reads(self.first)}
        while (at := max(waiting, default=-1)) >= 0:
            waiting.discard(at)
            if not self.may_join(at) or any(r not in self.places and r < self.first for r in self.readers(at)):
                continue
            if widens(self.eqn(at)) or all(map(self.scope.there, self.reads(at))):
                self.places.add(at)
                waiting |= {self.scope.made.get(name, -1) for name in self.reads(at)}

    def grow_beside(self) -> None:
        """Other reductions of the rows that are read by now, with elementwise work before them."""
        needs: dict[int, set[int]] = {}
        read = {name for at in self.places for name in self.reads(at) if J.shape(name[1]) == self.rows}
        waiting = [r for name in read for r in self.scope.readers[name]]
        heapify(waiting)
        while waiting:
            at = heappop(waiting)
            if at in needs or at in self.places or at in self.scope.moved or not self.able(at):
                continue
            makers = {self.scope.made.get(name, -1) for name in self.reads(at)}
            if any(p >= self.first and p not in needs for p in makers):
                continue
            needs[at] = {at}.union(*(needs.get(p, ()) for p in makers))
            if self.eqn(at).primitive.name in REDUCTIONS:
                self.places |= needs[at]
            else:
                for r in self.readers(at):
                    heappush(waiting, r)

    def may_join(self, at: int) -> bool:
        """Whether it is elementwise work whose result may be left, if others read it too."""
        if at in self.scope.moved or not self.able(at) or self.eqn(at).primitive.name in {*SAME, *REDUCTIONS}:
            return False
        return all(self.may_leave(v) for v in self.eqn(at).outvars)

    def grow_on(self) -> bool:
        """Who reads what is inside, in order."""
        waiting: list[int] = []
        seen = {*self.places}

        def look(places: Sequence[int]) -> None:
            for r in {r for at in places for r in self.readers(at)} - seen:
                seen.add(r)
                heappush(waiting, r)

        look(sorted(self.places))
        while waiting:
            at = heappop(waiting)
            if at in self.scope.moved:
                return False
            end = min(self.limit, at)
            if self.able(at) and (new := self.joining(at, end)) is not None:
                self.places |= {*new, at}
                look([*new, at])
            else:
                self.limit = end
        return True

    def joining(self, at: int, end: int) -> list[int] | None:
        """What has to join for a step to do so, if whatever else it reads is made before `end`: elementwise work on
        what is there, behind the reduction. None if it cannot."""
        makers = {p for name in self.reads(at) if (p := self.scope.made.get(name, -1)) not in self.places}
        if any(p >= end for p in makers):
            return None
        return [p for p in makers if p > self.first and self.feeds(p, end)]

    def feeds(self, at: int, end: int) -> bool:
        if not self.may_join(at) or any(r < end for r in self.readers(at)):
            return False
        return all(map(self.scope.there, self.reads(at)))

    def trim(self) -> set[int]:
        """Takes out what is not worth a result of its own, and who reads it does as well; it runs right behind."""
        behind: set[int] = set()
        while ends := {at for at in self.places if self.is_end(at)}:
            self.places -= ends
            behind |= ends
        return behind

    def is_end(self, at: int) -> bool:
        eqn = self.eqn(at)
        return (not_worth(eqn) or eqn.primitive.name in SAME) and self.places.isdisjoint(self.readers(at))

    def side_by_side(self) -> bool:
        """Whether two reductions do not need each other, and what comes of them goes back over rows."""
        needs: dict[Name, frozenset[int]] = {}
        own: dict[int, frozenset[int]] = {}
        back: set[int] = set()
        for at in sorted(self.places):
            before = frozenset[int]().union(*(needs.get(name, frozenset()) for name in self.reads(at)))
            if self.eqn(at).primitive.name in REDUCTIONS:
                own[at] = before
                before |= {at}
            elif any(J.shape(v) == self.rows for v in self.eqn(at).outvars):
                back |= before
            needs.update((name, before) for name in self.gives(at))
        return independent(own, sorted(back))

    def left(self) -> list[Any]:
        """What others read of it; nothing if that is what no kernel leaves."""
        found = [v for at in sorted(self.places) for f, v in self.gives(at) if self.is_left((f, v))]
        return found if all(map(self.may_leave, found)) else []

    def stands(self, behind: set[int]) -> int | None:
        """Before which place; None if something is read that is made after it, as where a kernel reads early what the
        group would compute late."""
        at, own = min(self.limit, max(self.places)), self.places | behind
        makers = {self.scope.made.get(name, -1) for p in own for name in self.reads(p)}
        return at if all(p < at for p in makers - own) else None

    def part(self, left: Sequence[Any]) -> int | None:
        """The place of a step that takes some rows of all that is left, alone reads it, and comes last."""
        name = (self.family, left[0])
        readers = [] if len(left) > 1 or name in self.scope.left else self.scope.readers[name]
        if len(readers) != 1 or readers[0] < max(self.places) or J.shape(left[0]) != self.rows:
            return None
        item = self.scope.items[readers[0]]
        return readers[0] if isinstance(item, Step) and not item.each and takes_rows(item.eqn) else None

    def is_left(self, name: Name) -> bool:
        return name in self.scope.left or not self.places.issuperset(self.scope.readers.get(name, ()))

    def may_leave(self, var: Any) -> bool:
        *sizes, _ = self.rows
        return J.shape(var) in {self.rows, tuple(sizes), (*sizes, 1)} and J.dtype(var) in DTYPES[:3]


def independent(needs: Mapping[int, frozenset[int]], places: Sequence[int]) -> bool:
    """Whether some of these do not need one another."""
    return any(a not in needs[b] for i, b in enumerate(places) for a in places[:i])


def runs(step: Step, rows: tuple[int, ...]) -> bool:
    """Whether a step can run on tiles of rows of such a shape."""
    eqn = step.eqn
    if step.each or len(eqn.outvars) != 1 or any(J.dtype(a) not in DTYPES for a in [*eqn.invars, *eqn.outvars]):
        return False
    shapes, out = [J.shape(a) for a in eqn.invars], J.shape(eqn.outvars[0])
    if any(isinstance(a, J.Literal) and J.shape(a) for a in eqn.invars):
        return False
    if any(dims_of(shape, rows) is None for shape in [*shapes, out]):
        return False
    if eqn.primitive.name in REDUCTIONS:
        along_rows = tuple(eqn.params["axes"]) == (len(rows) - 1,)
        return along_rows and shapes[0] == rows and J.dtype(eqn.outvars[0]) != "bool"
    if eqn.primitive.name in SAME:
        return keeps_dims(eqn, rows)
    return runs_on_tiles(eqn) and all(len(shape) in (0, len(out)) for shape in shapes)


def moves(eqn: J.Eqn) -> bool:
    return eqn.primitive.name in {*SAME, "slice"}


def widens(eqn: J.Eqn) -> bool:
    return eqn.primitive.name == "convert_element_type" and not_worth(eqn)
