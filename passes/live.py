"""Which values are live between the steps of a sequence, in which each reads values and binds others.

A value is what the sequence calls it, anything that can be hashed. It lives from the step that binds it to the last
that reads it; one that nobody reads does not live, and neither does what comes from elsewhere, such as a weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
Span = tuple[int, int]  # the steps that bind a value and read it last


def lifetimes(
    inputs: Iterable[Name],
    reads: Sequence[Iterable[Name]],
    binds: Sequence[Iterable[Name]],
    results: Iterable[Name] = (),
) -> dict[Name, Span]:
    """The span of each value that is read: born at -1 if it is an input, read until the end if it is a result."""
    born = dict.fromkeys(inputs, -1)
    born.update((name, i) for i, names in enumerate(binds) for name in names)
    last = {name: i for i, names in enumerate(reads) for name in names}
    last.update(dict.fromkeys(results, len(reads)))
    return {name: (at, last[name]) for name, at in born.items() if name in last}


def live_before(spans: Mapping[Name, Span], steps: int) -> Iterator[list[Name]]:
    """What is live before each step: bound before it, and read by it or after it."""
    came: list[list[Name]] = [[] for _ in range(steps + 1)]
    went: list[list[Name]] = [[] for _ in range(steps + 2)]
    for name, (born, last) in spans.items():
        if born < last:
            came[born + 1].append(name)
            went[last + 1].append(name)
    live: dict[Name, None] = {}
    for at in range(steps):
        for name in went[at]:
            live.pop(name, None)
        live.update(dict.fromkeys(came[at]))
        yield list(live)
