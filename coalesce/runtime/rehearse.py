"""Bundles that run for nothing, for who is not on the driver's thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from coalesce.runtime.driver import Driver, JOIN_S
from coalesce.runtime.finisher import Probe


def rehearse(driver: Driver, launches: Sequence[Callable[[], Any]]) -> Any:
    """Have the driver dispatch some bundles one after another, and wait; returns the last.

    Raises what they raise, or why nothing runs any more.
    """
    launched: list[Any] = []
    ended: SimpleQueue[int | Exception] = SimpleQueue()

    def launch() -> Any:
        launched.extend(one() for one in launches)
        return launched[-1]

    driver.carry_out(lambda: driver.probe(Probe(launch, ended.put)) or ())
    while True:
        try:
            outcome = ended.get(timeout=JOIN_S)
        except Empty:
            if driver.failure is not None or driver.stopped:
                raise driver.last_error from None
            continue
        if isinstance(outcome, Exception):
            raise outcome
        return launched[-1]
