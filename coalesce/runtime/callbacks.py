"""The thread that calls users' callbacks of requests which the driver has ended.

They may take as long as they like, or wait for other requests: nobody but another callback waits for them, and they
wait for no bundle.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from coalesce.runtime.inbox import Inbox

LOG = logging.getLogger("coalesce.runtime")


class Callbacks:
    def __init__(self) -> None:
        self._inbox = Inbox()
        self._stopped = False
        self._lock = threading.Lock()  # so that nothing is put into the inbox behind the end
        self.thread = threading.Thread(target=self._loop, name="coalesce-callbacks", daemon=True)

    def stop(self) -> None:
        """After what is to be called."""
        with self._lock:
            self._stopped = True
            self._inbox.put(None)

    def call(self, callback: Callable[[Any], Any], reply: Future[Any]) -> None:
        """On this thread; on the caller's if this one has ended, when a driver that hung comes back."""
        with self._lock:
            stopped = self._stopped
            if not stopped:
                self._inbox.put((callback, reply))
        if stopped:
            call(callback, reply)

    def _loop(self) -> None:
        while self._work():
            continue

    def _work(self) -> bool:
        """Whether there is more to come; nothing of what was done is held while this thread waits."""
        for item in self._inbox.take(None):
            if item is None:
                return False
            call(*item)
        return True


def call(callback: Callable[[Any], Any], reply: Future[Any]) -> None:
    try:
        callback(reply)
    except Exception:
        LOG.exception("a callback of a request raised")
