"""Of all who close a runtime one does it, and the others have it done sooner.

Whoever comes second waits for the first, and may be less patient: what still waits is ended then, and the first one
goes on. A signal handler that closes what the thread under it is closing only says how, and returns: it cannot wait for
itself. Who is interrupted (Ctrl-C) has closed nothing, and the next one does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from coalesce.runtime.terms import left_s


class Closing:
    """`hurry` ends what waits; called on any thread."""

    def __init__(self, hurry: Callable[[], None]) -> None:
        self._hurry = hurry
        self.soonest: float | None = None  # until when callbacks are waited for, by the one who waits the least
        self._who: tuple[int, object] | None = None  # a thread, and which call on it
        self.is_closed = False
        self._changed = threading.Condition()  # over a lock that a handler may have once more

    def by(self, close: Callable[[], None], until: float | None, called_until: float | None) -> None:
        """Returns when somebody has closed it. Those who come while another one does have it hurry at `until`."""
        if called_until is not None:
            self.soonest = called_until if self.soonest is None else min(self.soonest, called_until)
        if self.is_closed or self._is_mine():  # asked without the lock, which nobody lets go of in a forked process
            return
        own = threading.get_ident(), object()
        try:
            if self._turn_comes(own, until):
                close()
                self.is_closed = True
        finally:
            with self._changed:
                if self._who is own:
                    self._who = None
                self._changed.notify_all()

    def _is_mine(self) -> bool:
        who = self._who
        return who is not None and who[0] == threading.get_ident()

    def _turn_comes(self, own: tuple[int, object], until: float | None) -> bool:
        with self._changed:
            if not self._changed.wait_for(self._is_open_or_closed, left_s(until)):
                self._hurry()
                self._changed.wait_for(self._is_open_or_closed)
            if not self.is_closed:
                self._who = own
            return not self.is_closed

    def _is_open_or_closed(self) -> bool:
        return self.is_closed or self._who is None
