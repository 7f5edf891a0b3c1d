"""The thread that calls users' callbacks of requests which the runtime has ended.

They may take as long as they like, or wait for other requests: nobody but another callback waits for them, and they
wait for no bundle.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from coalesce.runtime.attendant import Attendant

LOG = logging.getLogger("coalesce.runtime")


class Callbacks(Attendant):
    def __init__(self) -> None:
        super().__init__("callbacks")
        self.asked = 0  # how many were ever to be called here
        self._called = 0  # how many of them were
        self._stopped = False  # nothing is put into the inbox any more
        self._changed = threading.Condition()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            super().stop()

    def call(self, callback: Callable[[Any], Any], reply: Future[Any]) -> None:
        """On this thread; on the caller's if this one has ended, when a driver that hung comes back."""
        with self._changed:
            stopped = self._stopped
            if not stopped:
                self.asked += 1
                self.inbox.put((callback, reply))
        if stopped:
            call(callback, reply)

    def wait_called(self, timeout_s: float | None) -> bool:
        """Whether what was to be called by now has been, after at most so long; a callback does not wait for itself."""
        if threading.current_thread() is self.thread:
            return True
        with self._changed:
            due = self.asked
            return self._changed.wait_for(lambda: self._called >= due, timeout_s)

    def handle(self, item: tuple[Callable[[Any], Any], Future[Any]]) -> None:
        try:
            call(*item)
        finally:
            with self._changed:
                self._called += 1
                self._changed.notify_all()


def call(callback: Callable[[Any], Any], reply: Future[Any]) -> None:
    try:
        callback(reply)
    except Exception:
        LOG.exception("a callback of a request raised")
