"""What others want done on the driver's thread, between two dispatches.

    Order        to be done; the policy is told the events that it returns
    Orders       those that somebody waits for: they end with an error when the driver does, or hangs
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from typing import NamedTuple

from coalesce.scheduler.events import Event


class Order(NamedTuple):
    do: Callable[[], Sequence[Event]]


class Orders:
    def __init__(self) -> None:
        self._open: set[Future[None]] = set()
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def carry_out(self, put: Callable[[Order], None], do: Callable[[], Sequence[Event]]) -> None:
        """Have it done, and wait until it is; raises what it raises, or why nothing is done any more.

        Who is interrupted (Ctrl-C) waits too, before that is raised: whoever undoes what an order was for must not be
        ahead of it.
        """
        done = Future[None]()
        with self._lock:
            if self._error is not None:
                raise self._error
            self._open.add(done)
        put(Order(lambda: self._try(do, done)))
        try:
            done.result()
        except BaseException:  # its own, or an interrupt's
            wait([done])
            raise
        finally:
            with self._lock:
                self._open.discard(done)

    def _try(self, do: Callable[[], Sequence[Event]], done: Future[None]) -> Sequence[Event]:
        try:
            events = do()
        except BaseException as e:
            end(done, e)
            return ()
        end(done, None)
        return events

    def fail_all(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or error
            waiting = list(self._open)
        for done in waiting:
            end(done, error)


def end(done: Future[None], error: BaseException | None) -> None:
    try:
        done.set_exception(error) if error is not None else done.set_result(None)
    except InvalidStateError:  # whoever waited was told before
        return
