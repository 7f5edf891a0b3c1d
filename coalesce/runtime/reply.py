"""What `Runtime.submit` returns: a future of concurrent.futures that takes a third of the time to make, end and read.

Of the requests of a bundle somebody waits for one, mostly, and looks at the others when they have ended too. What a
`Future` does for every request so that somebody may wait for it is done here for those that are waited for: a
`Condition`, which is made of Python's own functions, is there when it is first asked for, over a lock that was always
there; where nobody has, nobody is woken (`end_alone`). Whoever finds that a reply has ended takes no lock: how it ended
does not change. All else is what `Future` does, under the same lock, so that `wait` and `as_completed`, which know the
same attributes of a future as this does, take it too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, LOGGER, PENDING, RUNNING
from typing import Any, Protocol, runtime_checkable, TYPE_CHECKING

STOPPED = frozenset({CANCELLED, CANCELLED_AND_NOTIFIED})
ENDED = STOPPED | {FINISHED}
OPEN = frozenset({PENDING, RUNNING})
Lock = type(threading.RLock())  # to call it is quicker than the function that chooses it


@runtime_checkable
class Server(Protocol):
    """Who serves a request, as its `Reply` sees it."""

    def withdraw(self, request: int) -> None:
        """Nobody waits for it any more."""
        ...

    def call_back(self, callback: Callable[[Any], Any], reply: Future[Any]) -> None:
        """The request has ended: call it, on a thread that nobody else waits for."""
        ...

    def call_all_back(self, replies: Sequence[Reply]) -> None:
        """The same, of all callbacks of several of its requests."""
        ...


class Reply(Future[Any]):
    """`cancel()` works until a bundle with the request is on its way to the device."""

    # what each is at first, without a line of its own for every request
    _made: threading.Condition | None = None
    _state: str = PENDING
    _result: Any = None
    _exception: BaseException | None = None

    def __init__(self, request: int, server: Server) -> None:
        # instead of Future's own, which makes the condition
        self._lock = Lock()
        self._waiters: list[Any] = []
        self._done_callbacks: list[Callable[[Any], Any]] = []
        self.request = request  # its id, for Runtime.explain
        self.server = server

    if TYPE_CHECKING:  # what it is to others
        _condition: threading.Condition
    else:

        @property
        def _condition(self) -> threading.Condition:
            if self._made is None:
                with self._lock:
                    self._made = self._made or threading.Condition(self._lock)
            return self._made

    def cancelled(self) -> bool:
        return self._state in STOPPED

    def done(self) -> bool:
        return self._state in ENDED

    def result(self, timeout: int | float | None = None) -> Any:
        if self._state == FINISHED and self._exception is None:
            return self._result
        return super().result(timeout)

    def exception(self, timeout: int | float | None = None) -> BaseException | None:
        return self._exception if self._state == FINISHED else super().exception(timeout)

    def cancel(self) -> bool:
        if not super().cancel():
            return False
        self.server.withdraw(self.request)
        return True

    def add_done_callback(self, fn: Callable[[Any], Any]) -> None:
        """At once, if the request has ended, as futures do; else on the thread of callbacks, whoever ends it."""
        with self._lock:
            has_ended = self._state in ENDED
            if not has_ended:
                self._done_callbacks.append(fn)
        if not has_ended:
            return
        try:  # what Future does, without its condition
            fn(self)
        except Exception:
            LOGGER.exception("exception calling callback for %r", self)

    # Of whoever serves it

    def set_running_or_notify_cancel(self) -> bool:
        with self._lock:
            if self._state == PENDING:
                self._state = RUNNING
                return True
        return super().set_running_or_notify_cancel()

    def end_alone(self, result: Any, error: BaseException | None) -> bool:
        """Ends it, if nobody may be waiting for it, also in `_waiters`; its `callbacks` are left to be called then.
        Else nothing is done: `set_result` and `set_exception` wake whoever waits."""
        with self._lock:
            if self._made is not None or self._state not in OPEN:
                return False
            self._result, self._exception, self._state = result, error, FINISHED
        return True

    @property
    def callbacks(self) -> Sequence[Callable[[Any], Any]]:
        return self._done_callbacks

    def _invoke_callbacks(self) -> None:
        """Of all other ways in which it ends, that `Future` has."""
        for fn in self._done_callbacks:
            self.server.call_back(fn, self)
