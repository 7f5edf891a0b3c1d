"""What others want done on the driver's thread, between two dispatches.

Order        to be done; the policy is told the events that it returns
Orders       those that somebody waits for: they end with an error when the driver does, or hangs
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from copy import copy
from typing import NamedTuple

from coalesce.scheduler.events import Event


class Order(NamedTuple):
    do: Callable[[], Sequence[Event]]
    told: Callable[[], None] = lambda: None  # called when policy and observers know of the events


class Stop(NamedTuple):
    """There are no more."""


class Outcome:
    """Of an order that one thread waits for. An interrupt of that may leave the lock of a condition held, as a future
    has one, and the driver would wait for it for good: here nobody waits for a lock that who waits has."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._is_there = False
        self._untold = [True]  # whoever takes that out tells it
        self._told = threading.Lock()
        self._told.acquire()

    def tell(self, error: BaseException | None) -> None:
        """Only the first counts."""
        try:
            self._untold.pop()
        except IndexError:
            return
        self.error, self._is_there = error, True
        self._told.release()

    def wait(self) -> None:
        while not self._is_there:
            self._told.acquire()


class Orders:
    def __init__(self) -> None:
        self._open: set[Outcome] = set()
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def carry_out(self, put: Callable[[Order], None], do: Callable[[], Sequence[Event]]) -> None:
        """Have it done, and wait until it is; raises what it raises, or why nothing is done any more.

        Who is interrupted (Ctrl-C) waits too, before that is raised: whoever undoes what an order was for must not be
        ahead of it.
        """
        outcome = Outcome()
        with self._lock:
            if self._error is not None:
                raise copy(self._error)  # not the same one for all, which would keep what everybody had
            self._open.add(outcome)
        put(Order(lambda: self._try(do, outcome), lambda: outcome.tell(None)))
        try:
            outcome.wait()
        except BaseException:  # an interrupt's
            outcome.wait()
            raise
        finally:
            with self._lock:
                self._open.discard(outcome)
        if outcome.error is not None:
            raise outcome.error

    def _try(self, do: Callable[[], Sequence[Event]], outcome: Outcome) -> Sequence[Event]:
        try:
            return do()
        except BaseException as e:
            outcome.tell(e)
            return ()

    def fail_all(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or error
            waiting = list(self._open)
        for outcome in waiting:
            outcome.tell(copy(error))
