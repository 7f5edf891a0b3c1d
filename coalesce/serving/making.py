"""How something is compiled: `make(jitted, arguments, donated)` is JAX's Compiled, for values or structs of arguments.

`donated` are the positions of arguments that `jitted` donates, for who takes it elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Make = Callable[[Any, tuple[Any, ...], tuple[int, ...]], Any]


# XLA times kernels on the device to choose among them: whoever is served there meanwhile would wait for these.
UNTIMED: Mapping[str, Any] = {"xla_gpu_autotune_level": 0}


def make_here(
    jitted: Any, arguments: tuple[Any, ...], donated: tuple[int, ...] = (), options: Mapping[str, Any] | None = None
) -> Any:
    return jitted.lower(*arguments).compile(compiler_options=dict(options) if options else None)
