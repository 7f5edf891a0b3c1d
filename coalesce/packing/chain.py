"""Alignment of two sequences by dynamic programming, over the cells that may be chosen.

A cell pairs an element of one sequence with an element of the other; chosen cells must ascend in both, so they never
cross. This is Needleman and Wunsch ("A general method applicable to the search for similarities in the amino acid
sequence of two proteins", 1970) without gap costs, computed only where a pair is legal, as by Hunt and Szymanski ("A
fast algorithm for computing longest common subsequences", 1977): with prefix maxima in a binary indexed tree (Fenwick,
1994) k cells take O(k log k).

A cell wins its weight, and its bonus if the cells that it requires are chosen too. The best choice that ends in a cell
continues the best one that ends lower in both sequences, or the best that ends in the required cell. If no cell has
required cells but the one diagonally below it, as in two chains, no cell fits between the two, and the result is
optimal. Otherwise a required cell is also looked for among the last few of the choice that is continued.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

LOOK_BACK = 8  # chosen cells among which required ones are looked for
Position = tuple[int, int]


class Cell(NamedTuple):
    column: int
    weight: float
    bonus: float = 0.0
    required: tuple[Position, ...] = ()  # distinct cells, of earlier rows


class Choice(NamedTuple):
    """The best choice that ends in `position`."""

    value: float
    position: Position
    rest: Choice | None


def align_sequences(rows: Sequence[Iterable[Cell]], columns: int) -> list[Position]:
    """The (row, column) of the chosen cells, ascending."""
    tree: list[Choice | None] = [None] * (columns + 1)  # entry i covers the columns i - (i & -i) to i - 1
    at: dict[Position, Choice] = {}
    best: Choice | None = None
    for r, row in enumerate(rows):
        found: list[Choice] = []
        for cell in sorted(row):
            rest, won = continued(cell, at, lowest(tree, cell.column))
            found.append(Choice(cell.weight + won, (r, cell.column), rest))
        for choice in found:  # after the row is done: a row has one chosen cell
            at[choice.position] = choice
            record(tree, choice)
            if choice.value > (best.value if best else 0.0):
                best = choice
    chosen: list[Position] = []
    while best:
        chosen.append(best.position)
        best = best.rest
    return chosen[::-1]


def continued(cell: Cell, at: dict[Position, Choice], below: Choice | None) -> tuple[Choice | None, float]:
    """The choice that a cell continues best, and what that and the cell's bonus win."""
    rest, won = None, 0.0
    if below is not None and below.value > 0:
        rest, won = below, below.value
    if not cell.required:
        return rest, won
    starts = [below, *(at.get(position) for position in cell.required)]
    for start in starts:
        if start is None or start.position[1] >= cell.column:
            continue
        if start.value + cell.bonus > won and holds(start, cell.required):
            rest, won = start, start.value + cell.bonus
    return rest, won


def holds(choice: Choice | None, required: Sequence[Position]) -> bool:
    missing = set(required)
    for _ in range(LOOK_BACK):
        if choice is None or not missing:
            break
        missing.discard(choice.position)
        choice = choice.rest
    return not missing


def lowest(tree: Sequence[Choice | None], columns: int) -> Choice | None:
    """The best choice that ends in the first `columns` columns."""
    best: Choice | None = None
    while columns > 0:
        entry = tree[columns]
        if entry is not None and (best is None or entry.value > best.value):
            best = entry
        columns &= columns - 1
    return best


def record(tree: list[Choice | None], choice: Choice) -> None:
    i = choice.position[1] + 1
    while i < len(tree):
        entry = tree[i]
        if entry is None or choice.value > entry.value:
            tree[i] = choice
        i += i & -i
