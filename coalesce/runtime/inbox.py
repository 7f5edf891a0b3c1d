"""What happened, in order, from any thread to one that waits for it."""

from __future__ import annotations

from queue import Empty, SimpleQueue
from typing import Any


class Inbox:
    def __init__(self) -> None:
        self._items: SimpleQueue[Any] = SimpleQueue()
        self.put = self._items.put

    def take(self, timeout_s: float | None) -> list[Any]:
        """Everything that is there; waits for the first, at most so long if that is given."""
        get = self._items.get_nowait
        try:
            first = self._items.get(timeout=timeout_s) if timeout_s is None or timeout_s > 0 else get()
        except Empty:
            return []
        return [first, *[get() for _ in range(self._items.qsize())]]  # nobody else takes any
