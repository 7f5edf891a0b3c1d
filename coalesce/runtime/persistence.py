"""What was compiled is kept on disk, and read again by the next process that needs it: JAX's own persistent cache.

JAX has one for the process. A folder that the user has given it is used as it is. Otherwise JAX is given one only while
an executable is made here, and asked to forget it then, unless the user has given it another one by then: what the user
compiles meanwhile may land in it too, and what takes JAX less than its `jax_persistent_cache_min_compile_time_secs` is
not kept.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

OPTION = "jax_compilation_cache_dir"


def default_folder() -> Path | None:
    """$COALESCE_COMPILED, or ~/.cache/coalesce/compiled; None where the first is empty, or nobody is at home."""
    named = os.environ.get("COALESCE_COMPILED")
    if named is not None:
        return Path(named) if named else None
    try:
        return Path.home() / ".cache" / "coalesce" / "compiled"
    except RuntimeError:
        return None


class Keeping:
    """The first that makes something says where it is kept, until the last is done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._ours: str | None = None  # the folder, if JAX has it of us

    @contextmanager
    def __call__(self, folder: Path | None) -> Iterator[None]:
        if folder is None:
            yield
            return
        with self._lock:
            if not self._holders and getattr(jax.config, OPTION) is None:
                self._ours = str(folder)
                jax.config.update(OPTION, self._ours)
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders and self._ours is not None:
                    if getattr(jax.config, OPTION) == self._ours:
                        jax.config.update(OPTION, None)
                    self._ours = None
                    compilation_cache.reset_cache()  # JAX looks where once, whatever it is told then


keeping = Keeping()  # one for the process, as JAX's cache is
