"""What happened, in order, from any thread to one that waits for it.

What the device has done goes ahead where requests come faster than they can be looked at: it would wait for more work
until all of them were. Else it has its turn: whoever was cancelled before a bundle ended is not in the next one.
"""

from __future__ import annotations

from collections import deque
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

MOST = 1024  # items that are taken with the first: then it is seen what else has happened


class Look(NamedTuple):
    """In the place of what goes first, which is not there any more."""


class Inbox:
    def __init__(self) -> None:
        self._items: SimpleQueue[Any] = SimpleQueue()
        self._first: deque[Any] = deque()
        self.put = self._items.put

    def put_first(self, item: Any) -> None:
        """In its turn, but behind no more than is taken at a time."""
        self._first.append(item)
        self._items.put(Look())

    def take(self, timeout_s: float | None) -> list[Any]:
        """What is there, with at most MOST behind the first; waits for that, no longer than a time that is given."""
        get = self._items.get_nowait
        try:
            items = [self._items.get(timeout=timeout_s) if timeout_s is None or timeout_s > 0 else get()]
        except Empty:
            return []
        items += [get() for _ in range(min(self._items.qsize(), MOST))]  # nobody else takes any
        if not self._first:
            return items
        found = [self._first.popleft() if type(item) is Look and self._first else item for item in items]
        if len(items) > MOST:  # there may be many more
            found += [self._first.popleft() for _ in range(len(self._first))]
        return found
