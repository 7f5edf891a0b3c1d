"""The dependency graph with every pack contracted, in a topological order that is kept up to date.

Merging two blocks makes a cycle exactly if a path leads from one to the other. Blocks hold labels that grow along every
edge, so only blocks with labels between the two have to be searched, and only those that are found have to move: the
dynamic topological order of Pearce and Kelly ("A dynamic topological sort algorithm for directed acyclic graphs",
2006), in a linked list with labels (Dietz and Sleator, "Two algorithms for maintaining order in a list", 1987).
"""

from __future__ import annotations

from collections.abc import Sequence

from coalesce.packing.problem import Pack

GAP = 1 << 32  # between labels when they are handed out
Crossing = tuple[Pack, int, int]  # a pack on a path, the member that the path reaches and the one that it leaves from


class Quotient:
    """Blocks are numbered 0 to n - 1 in no order; a node starts as a block of its own.

    Attributes:
      block: the block of each node
      members: the nodes of each block; empty if the number is free
    """

    def __init__(self, after: Sequence[Sequence[int]], order: Sequence[int]) -> None:
        count = len(after)
        self.after = after
        self.block = list(range(count))
        self.members: list[Pack] = [(i,) for i in range(count)]
        self.free: list[int] = []
        self.label = [0] * (count + 1)  # the last is the list's head and has the smallest label
        self.next, self.previous = [0] * (count + 1), [0] * (count + 1)
        ring = [count, *order]
        for a, b in zip(ring, [*order, count], strict=True):
            self.next[a], self.previous[b] = b, a
        self.relabel()

    def blocks(self) -> list[int]:
        """In topological order."""
        head = len(self.block)
        found, b = [], self.next[head]
        while b != head:
            found.append(b)
            b = self.next[b]
        return found

    def relabel(self) -> None:
        for i, b in enumerate(self.blocks()):
            self.label[b] = (i + 1) * GAP

    def shatter(self, block: int) -> None:
        """Make a block of each member; they need no order among themselves."""
        first, *others = self.members[block]
        self.members[block] = (first,)
        fresh = [self.free.pop() for _ in others]
        for b, node in zip(fresh, others, strict=True):
            self.members[b] = (node,)
            self.block[node] = b
        self.insert(fresh, block)

    def unite(self, pack: Pack) -> list[Crossing] | None:
        """Make one block of nodes that are blocks of their own; None if done.

        Else nothing has changed, and the answer is the packs on a path between two members: empty, if one depends on
        the other whatever the packs are.
        """
        united = self.block[pack[0]]
        for node in pack[1:]:
            path = self.merge(united, self.block[node])
            if path is not None:
                if len(self.members[united]) > 1:
                    self.shatter(united)
                return [crossing for crossing in path if crossing[1] != crossing[2]]
            united = self.block[node]
        return None

    def merge(self, a: int, b: int) -> list[Crossing] | None:
        """Make one block of two, unless there is a path between them: then return what lies on it."""
        if self.label[a] > self.label[b]:
            a, b = b, a
        limit = self.label[b]
        came: dict[int, tuple[int, int, int]] = {a: (a, 0, 0)}  # block: (from block, its node, own node)
        queue = [a]
        for x in queue:  # which grows: breadth first, so that few packs lie on the path that is found
            for node in self.members[x]:
                for successor in self.after[node]:
                    y = self.block[successor]
                    if y in came or self.label[y] > limit:
                        continue
                    came[y] = (x, node, successor)
                    if y == b:
                        return self.path(came, a, b)
                    queue.append(y)
        del came[a]
        reached = sorted(came, key=self.label.__getitem__)
        for x in (a, *reached):
            self.unlink(x)
        for node in self.members[a]:
            self.block[node] = b
        self.members[b] = tuple(sorted(self.members[a] + self.members[b]))
        self.members[a] = ()
        self.free.append(a)
        self.insert(reached, b)
        return None

    def path(self, came: dict[int, tuple[int, int, int]], a: int, b: int) -> list[Crossing]:
        found: list[Crossing] = []
        x, leaves, _ = came[b]
        while x != a:
            before, node, reached = came[x]
            found.append((self.members[x], reached, leaves))
            x, leaves = before, node
        return found

    def unlink(self, block: int) -> None:
        a, b = self.previous[block], self.next[block]
        self.next[a], self.previous[b] = b, a

    def insert(self, blocks: Sequence[int], behind: int) -> None:
        """Put blocks, in this order, right behind another one."""
        if not blocks:
            return
        end, head = self.next[behind], len(self.block)
        low = self.label[behind]
        step = GAP if end == head else (self.label[end] - low) // (len(blocks) + 1)
        for i, b in enumerate(blocks):
            self.next[behind], self.previous[b] = b, behind
            self.label[b] = low + (i + 1) * step
            behind = b
        self.next[behind], self.previous[end] = end, behind
        if not step:
            self.relabel()
