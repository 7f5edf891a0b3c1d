"""How programs are planned and compiled for a device, by whether somebody is served there meanwhile.

It serves from the first request of a tenant on, and as long as tenants are here, who may ask for something at any time:
nobody knows when a compiler begins whether requests will come before it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from coalesce.runtime.apart import Apart
from coalesce.serving.making import make_here, Recipe, UNTIMED


class Making:
    """A `Make` for the JAX device `at`. `same`: a program always has the same kernels, also when it is made again."""

    def __init__(self, at: Any, apart: Apart | None, same: bool) -> None:
        self._at, self._same = at, same
        self.apart = apart if apart is not None and apart.takes_on(at) else None
        self.serves = False

    def __call__(self, recipe: Recipe) -> Any:
        """JAX's Compiled. While others are served it is made in a process of its own, and on a GPU, there or here,
        without kernels being timed to choose among them: which is chosen differs from time to time, too."""
        untimed = self._at.platform == "gpu" and (self.serves or self._same)
        made, options = None, UNTIMED if untimed else None
        if self.apart is not None and self.serves:
            made = self.apart.compile(self._at, recipe, options)
        return made if made is not None else make_here(recipe, options)

    def call(
        self, function: Callable[..., Any], *given: Any, known: Sequence[object] = (), inlined: bool = False
    ) -> Any:
        """What a function returns, which holds the interpreter's lock for long and returns something. While others are
        served it is called where executables are made, if it can be; see `Apart.call`."""
        found = None
        if self.apart is not None and self.serves:
            found = self.apart.call(function, *given, known=known, inlined=inlined)
        return found if found is not None else function(*given)
