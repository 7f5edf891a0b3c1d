"""What Python's collector of garbage looks through while somebody serves: not all that was there before.

A full collection holds the interpreter's lock for 100 ms and more where JAX and its programs are loaded, and programs
that are traced bring one about. What is there when the first runtime starts is set aside (`gc.freeze`) until the last
one is closed; if the process has set something aside by itself, nothing is changed.
"""

from __future__ import annotations

import gc
import threading

FEW = 1000  # Python 3.12 begins with some hundred objects set aside


class SetAside:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._ours = False

    def begin(self) -> None:
        with self._lock:
            self._holders += 1
            if self._holders == 1 and gc.get_freeze_count() < FEW:
                self._ours = True
                gc.freeze()

    def end(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders and self._ours:
                self._ours = False
                gc.unfreeze()


set_aside = SetAside()  # one for the process, as the collector is
