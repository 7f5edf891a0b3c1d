"""How many of a program's arguments each part of its schedule is the first to read: weights as they lie in the bank,
and a request's inputs. A host spends about a microsecond on each before anything of a call is launched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from coalesce import jaxpr as J
from coalesce.bundle import arguments, Bundle, equations, Item, items, JointStep, Pack, Schedule

Argument = tuple[str, int, int]  # ("slab", its number, 0) or ("input", family, its number)


def first_reads(bundle: Bundle, schedule: Schedule, starts: Sequence[int]) -> list[int]:
    """Of the parts of the schedule, in order, that begin at `starts`. An input counts once for each lane."""
    read = Reads(bundle)
    seen: set[Argument] = set()
    counts: list[int] = []
    for start, end in zip(starts, [*starts[1:], len(schedule)], strict=True):
        own = {argument for item in items(schedule[start:end]) for argument in read.by(item)} - seen
        seen |= own
        counts.append(sum(bundle.families[a].width if kind == "input" else 1 for kind, a, _ in own))
    return counts


class Reads:
    """What an item reads of a bundle's arguments."""

    def __init__(self, bundle: Bundle) -> None:
        self.slab_of = {array: i for i, slab in enumerate(arguments(bundle)) for array in slab.arrays}
        self.known: dict[tuple[int, J.Var], Argument] = {}
        for f, family in enumerate(bundle.families):
            self.known.update(((f, var), ("input", f, i)) for i, var in enumerate(family.inputs))
            for w, var in enumerate(family.weights):
                if (f, w) in bundle.stored:
                    self.known[f, var] = self.array(bundle.stored[f, w])

    def array(self, array: int) -> Argument:
        return "slab", self.slab_of[array], 0

    def by(self, item: Item) -> Iterator[Argument]:
        for f, eqn in equations(item):
            for atom in eqn.invars:
                if not isinstance(atom, J.Literal) and (f, atom) in self.known:
                    yield self.known[f, atom]
        if isinstance(item, Pack) and item.array is not None:
            yield self.array(item.array)
        if isinstance(item, JointStep):
            yield from (self.array(array) for array in item.arrays if array is not None)
