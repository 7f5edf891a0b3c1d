"""What is always true of a policy's decisions, checked while a driver runs."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from coalesce.runtime.observer import Observer
from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import Event
from coalesce.scheduler.invariants import Checker


class Checked(Observer):
    """Give one to each runtime, and assert `violations() == []` when it is closed."""

    def __init__(self) -> None:
        self.checker = Checker(depth=2)
        self._lock = threading.Lock()

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        with self._lock:
            self.checker.see(event, now_ns, commands)

    def violations(self) -> list[str]:
        with self._lock:
            return self.checker.finish()
