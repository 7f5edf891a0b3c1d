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
        self.count = 0  # of what was ever to be called here
        self._stopped = False
        self._lock = threading.Lock()  # so that nothing is put into the inbox behind the end

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            super().stop()

    def call(self, callback: Callable[[Any], Any], reply: Future[Any]) -> None:
        """On this thread; on the caller's if this one has ended, when a driver that hung comes back."""
        with self._lock:
            stopped = self._stopped
            if not stopped:
                self.count += 1
                self.inbox.put((callback, reply))
        if stopped:
            call(callback, reply)

    def wait_called(self, timeout_s: float | None) -> bool:
        """Whether what was to be called has been, after at most so long; a callback does not wait for itself."""
        called = threading.Event()
        with self._lock:
            if self._stopped or threading.current_thread() is self.thread:
                return True
            self.inbox.put(called)
        return called.wait(timeout_s)

    def handle(self, item: threading.Event | tuple[Callable[[Any], Any], Future[Any]]) -> None:
        if isinstance(item, threading.Event):
            item.set()
        else:
            call(*item)


def call(callback: Callable[[Any], Any], reply: Future[Any]) -> None:
    try:
        callback(reply)
    except Exception:
        LOG.exception("a callback of a request raised")
