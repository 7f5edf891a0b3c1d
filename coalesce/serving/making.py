"""How something is compiled: `make(jitted, arguments, donated)` is JAX's Compiled, for values or structs of arguments.

`donated` are the positions of arguments that `jitted` donates, for who takes it elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Make = Callable[[Any, tuple[Any, ...], tuple[int, ...]], Any]


def make_here(jitted: Any, arguments: tuple[Any, ...], donated: tuple[int, ...] = ()) -> Any:
    return jitted.lower(*arguments).compile()
