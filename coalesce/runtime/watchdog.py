"""A thread that notices when a device, or whoever waits for it, does not come back.

It looks at the clock now and then and takes no lock, so that whatever hangs cannot take it along.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from coalesce.errors import ServingError

LOOKS = 8  # in the time that is too long
LEAST_S, MOST_S = 0.02, 5.0


class Watchdog:
    """`overdue` says what hangs, or None; `lose` is told of it, once."""

    def __init__(
        self, overdue: Callable[[], ServingError | None], lose: Callable[[ServingError], None], hang_s: float
    ) -> None:
        self._overdue, self._lose = overdue, lose
        self._interval_s = min(MOST_S, max(LEAST_S, hang_s / LOOKS))
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._loop, name="coalesce-watchdog", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _loop(self) -> None:
        while not self._stop.wait(self._interval_s):
            what = self._overdue()
            if what is not None:
                self._lose(what)
                return
