"""The end of a runtime: of its stations, of whoever does something for tenants, and in a process that was forked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from coalesce.runtime.closing import Closing
from coalesce.runtime.errands import Errands
from coalesce.runtime.station import Station, wait_ended
from coalesce.runtime.terms import left_s
from coalesce.scheduler.events import Closed

PATIENCE_S = 5.0  # for callbacks, of who does not wait for requests
JOIN_S = 10.0  # for what is being done for tenants


class End:
    """`leave` is called at last."""

    def __init__(self, stations: Sequence[Station], errands: Errands, leave: Callable[[], None]) -> None:
        self._stations, self._errands, self._leave = stations, errands, leave
        self.closing = Closing(lambda: self._tell(drain=False))
        self._is_forked = False

    def drain(self, until: float | None) -> bool:
        """Whether every request has ended, and its callbacks, by then."""
        drivers = [station.driver for station in self._stations]
        if self._is_forked:  # what waits here, waits for ever
            return not any(driver.book.tickets for driver in drivers)
        return wait_ended(drivers, left_s(until))

    def close(self, drain: bool, until: float | None) -> None:
        """Once, by whoever comes first."""
        if not self.closing.is_closed:
            self._tell(drain)
        called_until = until if drain or until is not None else time.monotonic() + PATIENCE_S
        self.closing.by(lambda: self._close(until), until, called_until)

    def fork(self) -> None:
        """None of the threads is here, and who held a lock may be none of them."""
        self.closing.is_closed = self._is_forked = True

    def _close(self, until: float | None) -> None:
        for station in self._stations:
            station.close(until, lambda: self.closing.soonest)
        self._errands.wait(JOIN_S)
        self._leave()

    def _tell(self, drain: bool) -> None:
        for station in self._stations:
            station.driver.inbox.put(Closed(drain))
