"""A packing under change: what a change would win, and making it and taking it back.

A change says, for each node that it touches, the pack in which the node will be; nodes alone are packs of one. It
touches whole packs. Its exact difference of value involves the packs it makes and unmakes, and those whose operands
come from nodes it touches.
"""

from __future__ import annotations

from coalesce.packing.graph import Graph, ILLEGAL, sorted_topologically
from coalesce.packing.problem import Pack
from coalesce.packing.quotient import Crossing, Quotient

Change = dict[int, Pack]


class State:
    """`worth` is what each chosen pack wins; `value` is their sum; `done` are the inverses of all changes made."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        topological = sorted_topologically(graph.before, graph.after)
        rank = {node: i for i, node in enumerate(topological)}
        order = sorted(topological, key=lambda i: (graph.place[i], rank[i]))
        self.quotient = Quotient(graph.after, order)
        self.worth: dict[Pack, float] = {}
        self.done: list[Change] = []
        self.value = 0.0
        self.fed: set[Pack] = set()

    def pack(self, node: int) -> Pack:
        return self.quotient.members[self.quotient.block[node]]

    def stacked(self, pack: Pack, change: Change) -> bool:
        """Whether the pack's operands arrive stacked after the change."""
        slots = self.graph.sources(pack)
        if not slots:
            return False
        members, block = self.quotient.members, self.quotient.block
        for slot in slots:
            source = change.get(slot[0])
            if (members[block[slot[0]]] if source is None else source) != slot:
                return False
        return True

    def wins(self, pack: Pack, change: Change) -> float:
        if len(pack) == 1:
            return 0.0
        gain = self.graph.gain(pack)
        if gain != ILLEGAL and self.stacked(pack, change):
            gain += self.graph.bonus(pack)
        return gain

    def around(self, change: Change) -> list[Pack]:
        """Packs that the change leaves as they are and whose operands come from nodes that it touches."""
        readers = self.graph.readers
        block, members = self.quotient.block, self.quotient.members
        near = {block[reader] for node in change for reader in readers[node] if reader not in change}
        return [members[b] for b in near if len(members[b]) > 1]

    def delta(self, change: Change) -> float:
        """What a change would win; `ILLEGAL` if it makes an illegal pack. Cycles are not looked for."""
        won = 0.0
        for pack in dict.fromkeys(change.values()):
            won += self.wins(pack, change)
            if won == ILLEGAL:
                return ILLEGAL
        for pack in {self.pack(node) for node in change}:
            won -= self.worth.get(pack, 0.0)
        for pack in self.around(change):
            stacked = self.stacked(pack, change)
            if stacked != (pack in self.fed):
                won += self.graph.bonus(pack) if stacked else -self.graph.bonus(pack)
        return won

    def make(self, change: Change) -> list[Crossing] | None:
        """Make a change; None if done. Else nothing changed, and the answer is what `Quotient.unite` says."""
        quotient = self.quotient
        old = {node: self.pack(node) for node in change}
        unmade = [pack for pack in dict.fromkeys(old.values()) if len(pack) > 1]
        made = [pack for pack in dict.fromkeys(change.values()) if len(pack) > 1]
        for pack in unmade:
            quotient.shatter(quotient.block[pack[0]])
        for i, pack in enumerate(made):
            path = quotient.unite(pack)
            if path is None:
                continue
            for united in made[:i]:
                quotient.shatter(quotient.block[united[0]])
            for before in unmade:
                assert quotient.unite(before) is None, f"pack {before} cannot be restored"
            return path
        for pack in unmade:
            self.value -= self.worth.pop(pack)
            self.fed.discard(pack)
        for pack in [*made, *self.around(change)]:
            won = self.graph.gain(pack)
            if self.stacked(pack, {}):
                won += self.graph.bonus(pack)
                self.fed.add(pack)
            else:
                self.fed.discard(pack)
            self.value += won - self.worth.get(pack, 0.0)
            self.worth[pack] = won
        self.done.append(old)
        return None

    def undo(self, mark: int) -> None:
        """Go back to when `done` had `mark` entries."""
        while len(self.done) > mark:
            assert self.make(self.done.pop()) is None, "an earlier packing cannot be restored"
            self.done.pop()
