"""What is always true of a policy's decisions, checked while a driver runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from coalesce.runtime.observer import Observer
from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import Event
from coalesce.scheduler.invariants import Checker

PATIENCE_NS = 5_000_000_000  # less than the SLOs of those tests, and more than a busy host takes to wake a thread up


class Checked(Observer):
    """Give one to each runtime, and assert `violations() == []` when it is closed."""

    def __init__(self) -> None:
        self.devices = [OneDevice()]

    def on(self, device: int) -> Observer:
        while len(self.devices) <= device:
            self.devices.append(OneDevice())
        return self.devices[device]

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        self.devices[0].decided(event, now_ns, commands)

    def violations(self) -> list[str]:
        return [violation for own in self.devices for violation in own.violations()]


class OneDevice(Observer):
    def __init__(self) -> None:
        depth = 2 if jax.default_backend() == "cpu" else 3  # where the host brings bundles there may be one more
        self._checker = Checker(depth=depth, patience_ns=PATIENCE_NS)
        self._lock = threading.Lock()

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        with self._lock:
            self._checker.see(event, now_ns, commands)

    def violations(self) -> list[str]:
        with self._lock:
            return self._checker.finish()


@contextmanager
def checked_runtime(observers: Sequence[Observer] = (), **options: Any) -> Iterator[Any]:
    """A runtime, all decisions of which are checked when it is closed; of a device that failed nobody decides."""
    from coalesce.runtime.runtime import Runtime  # JAX, which a driver is tested without

    checked = Checked()
    with Runtime(observers=[*observers, checked], **options) as rt:
        yield rt
    for station, own in zip(rt._stations, checked.devices, strict=True):
        found = own.violations()[:3]
        assert station.driver.failure is not None or not found, found
