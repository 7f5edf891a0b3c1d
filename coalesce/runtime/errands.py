"""Threads that do one thing for a runtime, such as adding a tenant for whom nobody waits.

They may be in the middle of JAX's code, where an interpreter that ends would take the process along: so whoever closes
the runtime waits for them, when nothing is done on the device any more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from weakref import WeakSet

from coalesce.runtime.terms import left_s


class Errands:
    def __init__(self) -> None:
        self._threads = WeakSet[threading.Thread]()
        self._lock = threading.Lock()

    def thread(self, name: str, do: Callable[[], object]) -> threading.Thread:
        """One that is to be started."""
        made = threading.Thread(target=do, name=f"coalesce-{name}", daemon=True)
        with self._lock:
            self._threads.add(made)
        return made

    def wait(self, timeout_s: float) -> None:
        """Until those that there are have ended, but for the thread that asks; at most so long."""
        until = time.monotonic() + timeout_s
        with self._lock:
            others = [own for own in self._threads if own.is_alive() and own is not threading.current_thread()]
        for own in others:
            own.join(left_s(until))
