"""How programs are planned and compiled for a device, by whether somebody is served there meanwhile.

It serves from the first request of a tenant on, and as long as tenants are here, who may ask for something at any time:
nobody knows when a compiler begins whether requests will come before it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from coalesce.runtime.apart import Apart, is_wanted
from coalesce.serving.making import make_here, Recipe, UNTIMED


class Making:
    """A `Make` for the JAX device `at`. `same`: a program always has the same kernels, also when it is made again."""

    def __init__(self, at: Any, apart: Apart | None, same: bool) -> None:
        self._at, self._same = at, same
        self.apart = apart if is_wanted(at.platform) else None
        self.serves = False

    def __call__(self, recipe: Recipe) -> Any:
        """JAX's Compiled. While others are served it is made in a process of its own, or, on a GPU, without kernels
        being timed there to choose among them: which is chosen differs from time to time, too."""
        made = None
        if self.apart is not None and self.serves:
            made = self.apart.compile(self._at, recipe)
        untimed = self._at.platform == "gpu" and (self.serves or self._same)
        return made if made is not None else make_here(recipe, UNTIMED if untimed else None)

    def call(
        self, function: Callable[..., Any], *given: Any, known: Sequence[object] = (), inlined: bool = False
    ) -> Any:
        """What a function returns, which holds the interpreter's lock for long and returns something. While others are
        served it is called where executables are made, if it can be; see `Apart.call`."""
        found = None
        if self.apart is not None and self.serves:
            found = self.apart.call(function, *given, known=known, inlined=inlined)
        return found if found is not None else function(*given)
