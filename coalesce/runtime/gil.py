"""How soon a thread that waits for the interpreter's lock gets it, while another one traces.

Tracing, the passes and lowering keep the lock busy for tens of milliseconds a program, and who serves would wait for
it at every step of a request: Python hands it on after 5 ms at the earliest. While a tenant is taken in and while
programs are made, also on a user's thread, it does so after EAGER_S. That is a setting of the whole process, so what it
was before is remembered here for all runtimes, and comes back with the last of them that makes something.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EAGER_S = 2e-5


class Eagerness:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._usual_s = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._holders:
                self._usual_s = sys.getswitchinterval()
                sys.setswitchinterval(min(self._usual_s, EAGER_S))
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    sys.setswitchinterval(self._usual_s)


handing_on = Eagerness()  # one for the process, as the setting is
