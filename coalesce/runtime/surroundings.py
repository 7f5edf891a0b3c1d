"""What a runtime asks of the process that it serves in, and gives back when it is closed."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from weakref import WeakMethod

from coalesce.runtime.apart import Apart
from coalesce.runtime.frozen import set_aside
from coalesce.runtime.gil import handing_on
from coalesce.runtime.persistence import default_folder, keeping


class Surroundings:
    """`apart` compiles elsewhere; `around` is a context for making programs, which are kept in a folder."""

    def __init__(self, compiled: str | os.PathLike[str] | Literal[False] | None) -> None:
        self.apart = Apart()
        self.around = making(compiled)
        self._pid, self._end = os.getpid(), lambda: None
        set_aside.begin()

    def end_with_interpreter(self, end: Callable[[], None]) -> None:
        """Have `end` called when the interpreter ends, unless the runtime was closed before: a thread of ours that is
        in the middle of JAX's code then would take the process along."""
        self._end = end
        atexit.register(self._at_exit)

    def end_in_a_fork(self, end: Callable[[], None]) -> None:
        """Have `end`, a method, called in each process that is forked off this one while its object lives."""
        method = WeakMethod(end)

        def in_child() -> None:
            own = method()
            if own is not None:
                own()

        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=in_child)

    def _at_exit(self) -> None:
        if os.getpid() == self._pid:  # a child has none of the threads
            self._end()

    def leave(self) -> None:
        atexit.unregister(self._at_exit)
        set_aside.end()


def making(compiled: str | os.PathLike[str] | Literal[False] | None) -> Callable[[], Any]:
    """A context for making executables, which are kept in the folder `compiled`."""
    folder = default_folder() if compiled is None else None if compiled is False else Path(compiled).expanduser()

    @contextmanager
    def around() -> Iterator[None]:
        with handing_on(), keeping(folder):
            yield
        set_aside.again()

    return around
