"""Programs aligned one after the other: a first packing.

Feng and Doolittle ("Progressive sequence alignment as a prerequisite to correct phylogenetic trees", 1987) align the
most similar sequences first and treat what is aligned as one sequence. Here the aligned programs are a sequence of
packs and of nodes alone, in an order in which they can run, and a cell wins what a node adds to a pack. The next
program is that with the most nodes of kinds that the aligned ones have. Programs are graphs, so each is first put in a
linear order; what another order would allow is left to annealing.
"""

from __future__ import annotations

from collections.abc import Sequence

from coalesce.packing.chain import align_sequences, Cell
from coalesce.packing.graph import Graph, ILLEGAL
from coalesce.packing.problem import Pack, ranked_order
from coalesce.packing.state import State

PARTNERS = 64  # blocks that one node is paired with


def by_place(graph: Graph, block: Pack) -> tuple:
    """Like a clock that all programs share: the first half of each comes before the second half of any."""
    return (sum(graph.place[i] for i in block) / len(block), block)


def align_programs(state: State, hope: float = 0.0) -> None:
    """Add every program to a packing that has none. `hope` is the share of its bonus that a pack counts on before what
    feeds it is known to be packed."""
    graph = state.graph
    waiting = list(range(len(graph.programs)))
    aligned: list[int] = []
    have: set[int] = set()
    while waiting:
        following = max(waiting, key=lambda p: (sum(graph.kind[i] in have for i in graph.programs[p]), -p))
        if aligned:
            align_program(state, following, aligned, hope)
        waiting.remove(following)
        aligned.append(following)
        have.update(graph.kind[i] for i in graph.programs[following])


def align_program(state: State, program: int, others: Sequence[int], hope: float) -> None:
    graph = state.graph
    columns = linear(state, others)
    rows = linear(state, [program])
    column_of = {i: c for c, block in enumerate(columns) for i in block}
    row_of = {block[0]: r for r, block in enumerate(rows) if len(block) == 1}
    share = max(PARTNERS // len(others), 4)
    cells: list[list[Cell]] = []
    for block in rows:
        near = {column_of[i] for other in others for i in graph.near(block[0], other, share)} if len(block) == 1 else ()
        found = (cell(state, block[0], c, columns[c], column_of, row_of, hope) for c in sorted(near))
        cells.append([one for one in found if one.weight != ILLEGAL])
    for r, c in align_sequences(cells, len(columns)):
        pack = tuple(sorted(rows[r] + columns[c]))
        state.make({i: pack for i in pack})


def cell(
    state: State, node: int, c: int, block: Pack, column_of: dict[int, int], row_of: dict[int, int], hope: float
) -> Cell:
    """What it wins that a node joins a block."""
    graph = state.graph
    pack = tuple(sorted((node, *block)))
    weight = graph.gain(pack)
    if weight == ILLEGAL:
        return Cell(c, ILLEGAL)
    weight -= state.worth.get(block, 0.0)
    if hope and graph.feeders[node]:
        weight += hope * graph.bonus(pack)
        if len(block) > 1 and not state.stacked(block, {}):
            weight -= hope * graph.bonus(block)
        return Cell(c, weight, (1 - hope) * graph.bonus(pack))
    slots = tuple(zip(graph.feeders[node], graph.feeders[block[0]], strict=False)) if state.stacked(block, {}) else ()
    if not slots or len(graph.feeders[node]) != len(graph.feeders[block[0]]):
        return Cell(c, weight)
    required = tuple({(row_of.get(own, -1), column_of.get(other, -1)) for own, other in slots})
    return Cell(c, weight, graph.bonus(pack), required)


def linear(state: State, programs: Sequence[int]) -> list[Pack]:
    """The blocks of some programs in an order in which they can run."""
    graph, taken = state.graph, set(programs)
    blocks = list(dict.fromkeys(state.pack(i) for p in programs for i in graph.programs[p]))
    number = {i: b for b, block in enumerate(blocks) for i in block}
    waits = [{number[p] for i in block for p in graph.before[i] if graph.program[p] in taken} for block in blocks]
    order = ranked_order(waits, [by_place(graph, block) for block in blocks])
    assert len(order) == len(blocks), "the packs make a cycle"
    return [blocks[b] for b in order]
