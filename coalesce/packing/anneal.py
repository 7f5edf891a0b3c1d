"""Simulated annealing on the true value of a packing (Kirkpatrick, Gelatt and Vecchi, "Optimization by simulated
annealing", Science 1983), from the packing that alignment gives.

A step proposes what a node may do about a partner (moves.py). A change that loses is made with a probability that falls
as the search cools. One that would make a cycle ejects what closes it, as long as that leaves the change worth making.
The best packing on the way is what remains.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from coalesce.packing.moves import draw, propose
from coalesce.packing.state import Change, State

EJECTIONS = 4  # packs that one change may put out
LEAST = 1e-9  # microseconds that count as more


def anneal(state: State, partners: Sequence[list[int]], steps: int, hot: float, cold: float, seed: int) -> None:
    """`partners[i]` are the nodes that node i is considered with; `hot` and `cold` are microseconds. Deterministic."""
    chance = random.Random(seed)
    nodes = [i for i, near in enumerate(partners) if near]
    best, mark = state.value, len(state.done)
    for step in range(steps):
        node = draw(chance, nodes)
        change = propose(state, chance, node, draw(chance, partners[node]))
        least = hot * (cold / hot) ** (step / steps) * math.log(1 - chance.random())
        if state.delta(change) > least and perform(state, change, least) and state.value > best + LEAST:
            best, mark = state.value, len(state.done)
    state.undo(mark)


def perform(state: State, change: Change, least: float) -> bool:
    """Make a change, together with what it takes to keep it free of cycles; False if that wins less than `least`."""
    for _ in range(EJECTIONS + 1):
        path = state.make(change)
        if path is None:
            return True
        best, most = None, least
        for pack, reached, left in path:
            if any(len(change.get(i, ())) > 1 for i in pack):
                continue  # it is what the change is about
            for out in ((reached,), (left,)) if len(pack) > 2 else (pack,):
                stay = tuple(i for i in pack if i not in out)
                wider = {**change, **{i: (i,) for i in out}, **dict.fromkeys(stay, stay)}
                won = state.delta(wider)
                if won > most:
                    best, most = wider, won
        if best is None:
            return False
        change = best
    return False
