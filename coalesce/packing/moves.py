"""What a node may do, as changes: leave its pack, join another, trade places, start a pack; and what may follow."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TypeVar

from coalesce.packing.graph import Graph
from coalesce.packing.problem import Pack
from coalesce.packing.state import Change, State

FOLLOW = 0.4  # how often a change goes on to packs that read what it packs, or that compute its operands
T = TypeVar("T")


def propose(state: State, chance: random.Random, node: int, partner: int) -> Change:
    """One of the things that a node may do about a partner, drawn at random; it may be illegal."""
    own, other = state.pack(node), state.pack(partner)
    if partner in own:
        change = forming(state, {}, (node,) if len(own) == 2 or chance.random() < 0.5 else (node, partner))
    else:
        change = draw(chance, options(state, node, own, other, partner))()
    pack = change[node]
    while len(pack) > 1 and chance.random() < FOLLOW:
        follow = list(extensions(state.graph, pack))
        if not follow:
            break
        packs = draw(chance, follow)
        for more in packs:
            change = forming(state, change, more)
        pack = draw(chance, packs)
    return change


def options(state: State, node: int, own: Pack, other: Pack, partner: int) -> list[Callable[[], Change]]:
    """For nodes of different packs. A pack has one node of each program, so a newcomer puts out that of its program."""
    graph = state.graph
    program = graph.program
    out = () if graph.within else tuple([i for i in other if program[i] == program[node]])
    stay = tuple([i for i in other if i not in out])
    found = [lambda: forming(state, {}, (node, *stay))]
    if len(own) > 1:
        found.append(lambda: forming(state, {}, (node,)))
        if out:
            found.append(lambda: forming(state, forming(state, {}, (node, *stay)), own_without(own, node) + out))
        elif mixes(graph, own + other):
            found.append(lambda: forming(state, {}, own + other))
    if len(other) > 1:
        found.append(lambda: forming(state, {}, (node, partner)))
    return found


def own_without(pack: Pack, node: int) -> Pack:
    return tuple([i for i in pack if i != node])


def forming(state: State, change: Change, nodes: Pack) -> Change:
    """The change widened by a pack of these nodes; what they leave behind of other packs stays together."""
    pack = tuple(sorted(nodes))
    wider = dict.fromkeys(pack, pack)
    for i in pack:
        own = change.get(i) or state.pack(i)
        if len(own) > 1:
            rest = tuple([j for j in own if j not in wider])
            wider.update(dict.fromkeys(rest, rest))
    return {**change, **wider} if change else wider


def extensions(graph: Graph, pack: Pack) -> Iterator[list[Pack]]:
    """Lists of packs: those whose results are the operands of `pack`; then, one by one, those that may read it."""
    sources = list(dict.fromkeys(graph.sources(pack)))
    if sources and all(stacks(graph, source) for source in sources):
        yield sources
    for reader in graph.readers[pack[0]]:
        slot = graph.feeders[reader].index(pack[0])
        follow = [reader]
        for i in pack[1:]:
            fits = (r for r in graph.readers[i] if graph.kind[r] == graph.kind[reader] and reads(graph, r, slot, i))
            follow.append(next(fits, -1))
        if -1 not in follow and stacks(graph, tuple(follow)):
            yield [tuple(follow)]


def reads(graph: Graph, reader: int, slot: int, node: int) -> bool:
    return len(graph.feeders[reader]) > slot and graph.feeders[reader][slot] == node


def stacks(graph: Graph, nodes: Pack) -> bool:
    """Whether nodes, in this order, may be the rows of one pack."""
    ascending = all(a < b for a, b in zip(nodes, nodes[1:], strict=False))
    return ascending and len({graph.kind[i] for i in nodes}) == 1 and mixes(graph, nodes)


def mixes(graph: Graph, nodes: Pack) -> bool:
    """Whether nodes of one kind may be one pack as far as their programs go."""
    return graph.within or len({graph.program[i] for i in nodes}) == len(nodes)


def draw(chance: random.Random, things: list[T]) -> T:
    return things[int(chance.random() * len(things))]
