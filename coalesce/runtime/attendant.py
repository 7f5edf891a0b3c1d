"""A thread that handles what is put into its inbox, one item after the other.

While it waits for more it holds nothing of what it did: the arrays of a bundle, or what a request brought, go when they
are done with, and not when the next ones come.
"""

from __future__ import annotations

import threading
from typing import Any

from coalesce.runtime.inbox import Inbox


class Attendant:
    """Subclasses say in `handle` what is done with an item; what it raises ends the thread."""

    def __init__(self, name: str) -> None:
        self.inbox = Inbox()
        self.thread = threading.Thread(target=self._loop, name=f"coalesce-{name}", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """After what is in its inbox."""
        self.inbox.put(None)

    def handle(self, item: Any) -> None:
        raise NotImplementedError

    def _loop(self) -> None:
        while self._work():
            continue

    def _work(self) -> bool:
        """Whether there is more to come. It is left before the next wait, and what it took is let go with it."""
        items = self.inbox.take(None)
        items.reverse()
        while items:
            item = items.pop()  # out of the list: what came with it does not wait until all of them are done
            if item is None:
                return False
            self.handle(item)
        return True
