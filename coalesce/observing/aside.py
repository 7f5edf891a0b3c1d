"""What an observer has to do that takes a while, on a thread of its own.

The runtime's threads only put what they saw into a queue. A queue that grows longer than `most`, since whoever writes
cannot keep up, takes nothing more until it has shrunk; `dropped` counts what was lost, for that or since it could not
be handled. The log has the first that could not, with its traceback, and at the end how many were lost.
"""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue
from typing import Any, TypeVar

from coalesce.runtime.observer import Observer

LOG = logging.getLogger("coalesce.runtime")
Own = TypeVar("Own", bound="Aside")


class Lost(Exception):
    """What `handle` or `finish` raises where more is lost than what it was given: how many, with that."""

    def __init__(self, count: int) -> None:
        super().__init__(f"the last {count} are lost")
        self.count = count


class Aside(Observer):
    """Subclasses `put` what they were told, and say in `handle` what is done with it. Close it after the runtime."""

    def __init__(self, most: int = 100_000) -> None:
        self._dropped = [0]  # what copies of this one have in common with it
        self._most = most
        self._items: SimpleQueue[Any] = SimpleQueue()
        self._closed = self._failed = False
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

    def lacking(self, dropped: int) -> str:
        """What the log says at the end, where something was."""
        return f"{type(self).__name__} lacks {dropped} of what it was told, which came too fast or could not be taken"

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
        if self.dropped:
            LOG.warning("%s", self.lacking(self.dropped))

    def _try(self, do: Any, *args: Any) -> None:
        try:
            do(*args)
        except BaseException as e:  # as a SystemExit of an exporter's: others go on putting things here
            self._dropped[0] += e.count if isinstance(e, Lost) else 1
            if self._failed:
                return
            self._failed = True
            LOG.exception("%s could not take what it was told; it goes on with the next", type(self).__name__)
