"""What an observer has to do that takes a while, on a thread of its own.

The runtime's threads only put what they saw into a queue. A queue that grows longer than `most`, since whoever writes
cannot keep up, takes nothing more until it has shrunk; `dropped` counts what was lost.
"""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue
from typing import Any, TypeVar

from coalesce.runtime.observer import Observer

LOG = logging.getLogger("coalesce.runtime")
Own = TypeVar("Own", bound="Aside")


class Aside(Observer):
    """Subclasses `put` what they were told, and say in `handle` what is done with it. Close it after the runtime."""

    def __init__(self, most: int = 100_000) -> None:
        self._dropped = [0]  # what copies of this one have in common with it
        self._most = most
        self._items: SimpleQueue[Any] = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=f"coalesce-{type(self).__name__.lower()}", daemon=True)
        self._thread.start()

    def put(self, item: Any) -> None:
        if self._items.qsize() < self._most:
            self._items.put(item)
        else:
            self._dropped[0] += 1

    @property
    def dropped(self) -> int:
        return self._dropped[0]

    def handle(self, item: Any) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Called on the thread after the last item."""

    def flush(self) -> None:
        """Returns when everything that was put before has been handled."""
        done = threading.Event()
        self._items.put(done)
        if not self._closed:
            done.wait()

    def close(self) -> None:
        """Handle what is there, and end. Twice is once."""
        if self._closed:
            return
        self._closed = True
        self._items.put(None)
        self._thread.join()

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _loop(self) -> None:
        while (item := self._items.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            else:
                self._try(self.handle, item)
            del item  # it may hold a request, and this thread may wait for long
        self._try(self.finish)

    def _try(self, do: Any, *args: Any) -> None:
        try:
            do(*args)
        except Exception:
            LOG.exception("%s could not take what it was told; it goes on with the next", type(self).__name__)
