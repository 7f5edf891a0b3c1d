"""What a runtime asks of the process that it serves in, and gives back when it is closed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from coalesce.runtime.apart import Apart
from coalesce.runtime.frozen import set_aside
from coalesce.runtime.gil import handing_on
from coalesce.runtime.persistence import default_folder, keeping


class Surroundings:
    """`apart` compiles elsewhere; `around` is a context for making programs, which are kept in a folder."""

    def __init__(self, compiled: str | os.PathLike[str] | Literal[False] | None) -> None:
        self.apart = Apart()
        self.around = making(compiled)
        set_aside.begin()

    def leave(self) -> None:
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
