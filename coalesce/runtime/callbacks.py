"""The thread that calls users' callbacks of requests which the runtime has ended.

They may take as long as they like, or wait for other requests: nobody but another callback waits for them, and they
wait for no bundle.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from coalesce.runtime.attendant import Attendant
from coalesce.runtime.gil import handing_on
from coalesce.runtime.reply import Reply

LOG = logging.getLogger("coalesce.runtime")

Call = tuple[Callable[[Any], Any], Future[Any]]  # what is called, and what it is given


class Batch(NamedTuple):
    calls: list[Call]
    put_ns: int


class Callbacks(Attendant):
    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__("callbacks")
        self._clock = clock
        self._free_ns = 0  # since when nothing is called
        self._late_ns = 0
        self.asked = 0  # how many were ever to be called here
        self._called = 0  # how many of them were
        self._stopped = False  # nothing is put into the inbox any more
        self._ended = False  # and nothing is taken from it
        self._lock = threading.RLock()  # a signal handler or a `__del__` may end a request while its thread has it
        self._changed = threading.Condition(self._lock)  # to enter a condition takes longer than its lock
        self._waiting = 0  # threads, for callbacks to be called

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            super().stop()

    def call(self, callback: Callable[[Any], Any], reply: Future[Any]) -> None:
        """On this thread; on the caller's if this one has ended, when a driver that hung comes back."""
        self._put([(callback, reply)])

    def call_all(self, replies: Sequence[Reply]) -> None:
        """What is to be called when these have ended, one after another."""
        self._put([(callback, reply) for reply in replies for callback in reply.callbacks])

    def late_ns(self) -> int:
        """How long it took the thread to begin with what it began with last, without what others' callbacks took; 0 if
        that was told before. On a host that is slow to wake threads up clients have results so much later."""
        late_ns, self._late_ns = self._late_ns, 0
        return late_ns

    def _put(self, calls: list[Call]) -> None:
        """All at once: each time that something is put may wake the thread up."""
        with self._lock:
            stopped = self._stopped
            if not stopped:
                self.asked += len(calls)
                self.inbox.put(Batch(calls, self._clock()))
        if stopped:
            for one in calls:
                call(*one)

    def wait_called(self, timeout_s: float | None) -> bool:
        """Whether what was to be called by now has been, after at most so long, or once nothing is called any more.
        Not for a callback, which would wait for itself."""
        with self._changed:
            due = self.asked
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: self._called >= due or self._ended, timeout_s)
            finally:
                self._waiting -= 1
            return self._called >= due

    def handle(self, item: Batch) -> None:
        handing_on.keep_time()
        self._late_ns = self._clock() - max(item.put_ns, self._free_ns)
        calls = item.calls
        calls.reverse()
        while calls:
            call(*calls.pop())  # out of the list, and let go
            self._called += 1
            if self._waiting:  # whoever begins to wait after this has seen the count
                with self._changed:
                    self._changed.notify_all()
        self._free_ns = self._clock()

    def _loop(self) -> None:
        try:
            super()._loop()
        finally:  # also for a bug of ours: from then on whoever ends a request calls back
            with self._changed:
                self._stopped = self._ended = True
                self._changed.notify_all()


def call(callback: Callable[[Any], Any], reply: Future[Any]) -> None:
    """Whatever it raises: a CancelledError or a SystemExit must not end the thread that others are called back on."""
    try:
        callback(reply)
    except BaseException:
        LOG.exception("a callback of a request raised")
