"""A device and everything that serves on it: what decides, what makes executables, and where tenants live."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from coalesce.runtime.accounts import Accounts
from coalesce.runtime.device import Device
from coalesce.runtime.driver import Driver
from coalesce.runtime.foundry import Foundry
from coalesce.runtime.gil import handing_on
from coalesce.runtime.history import History
from coalesce.runtime.observer import Observer, Observers
from coalesce.runtime.persistence import default_folder, keeping
from coalesce.runtime.quarters import Quarters
from coalesce.scheduler.events import Closed
from coalesce.scheduler.policy import Policy


class Station:
    def __init__(
        self,
        number: int,
        device: Device,
        policy: Policy,
        accounts: Accounts,
        observers: Sequence[Observer],
        clock: Callable[[], int],
        *,
        widths: Sequence[int],
        capacity: int | None,
        executables: int,
        hang_s: float,
        stall_s: float,
        around: Callable[[], Any],
    ) -> None:
        self.number, self.device = number, device
        self.history = History()
        watching = Observers([accounts, self.history, *(observer.on(number) for observer in observers)])
        self.foundry = Foundry(device, widths, executables, stall_s, around)
        self.driver = Driver(policy, device, watching, clock, self.foundry, hang_s)
        self.quarters = Quarters(device, self.driver, self.foundry, accounts, widths, capacity)
        self.foundry.start(self.driver)
        self.driver.start()

    @property
    def status(self) -> str:
        return "failed" if self.driver.failure is not None else "closed" if self.driver.stopped else "serving"

    def close(self, timeout_s: float | None) -> None:
        """After what waits, which the driver was told of."""
        if not self.driver.book.wait_empty(timeout_s):
            self.driver.inbox.put(Closed(drain=False))
            self.driver.book.wait_empty(None)
        self.foundry.stop()
        self.driver.stop()


def making(compiled: str | os.PathLike[str] | Literal[False] | None) -> Callable[[], Any]:
    """A context for making executables, which are kept in the folder `compiled`."""
    folder = default_folder() if compiled is None else None if compiled is False else Path(compiled).expanduser()

    @contextmanager
    def around() -> Iterator[None]:
        with handing_on(), keeping(folder):
            yield

    return around
