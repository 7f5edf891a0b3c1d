"""A thread that notices when a device, or whoever waits for it, does not come back.

It looks at the clock now and then and takes no lock, so that whatever hangs cannot take it along. Where it comes late
to look itself, the process was stopped (Ctrl-Z, a container that is paused, a debugger), and nobody else could do
anything meanwhile: then all have as long again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from coalesce.errors import ServingError

LOOKS = 8  # in the time that is too long
LEAST_S, MOST_S = 0.02, 5.0


class Watchdog:
    """`overdue` says what hangs, or None; `lose` is told of it, once."""

    def __init__(
        self,
        overdue: Callable[[], ServingError | None],
        lose: Callable[[ServingError], None],
        hang_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._overdue, self._lose, self._clock_s, self._hang_s = overdue, lose, clock_s, hang_s
        self._interval_s = min(MOST_S, max(LEAST_S, hang_s / LOOKS))
        self._looked_s = self._patient_s = clock_s()  # when it looked last, and until when it finds nothing
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._loop, name="coalesce-watchdog", daemon=True)

    def start(self) -> None:
        self._looked_s = self._clock_s()
        self.thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _loop(self) -> None:
        while not self._stop.wait(self._interval_s):
            if self.look():
                return

    def look(self) -> bool:
        """Whether something hangs, of which was told."""
        now_s = self._clock_s()
        late_s, self._looked_s = now_s - self._looked_s - self._interval_s, now_s
        if late_s > self._hang_s / 2:
            self._patient_s = now_s + self._hang_s
        what = self._overdue() if now_s >= self._patient_s else None
        if what is not None:
            self._lose(what)
        return what is not None
