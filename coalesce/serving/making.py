"""How something is compiled: `make(recipe)` is JAX's Compiled.

A recipe says what is to be compiled, and traces nothing before it is called: whoever compiles in another process has it
traced and lowered there too, if it can be brought there. So recipes are partial functions of what coalesce.jaxpr's
`dumps` takes, where that can be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from coalesce.bank import default_device
from coalesce.capture.aside import OPTIONS
from coalesce.kernels.platforms import only


class Jitted(NamedTuple):
    """A function of `jax.jit`, with values or structs of its arguments; `donated` are the positions of those that it
    donates, for who takes it elsewhere. `often`: it runs for requests, and not once for a tenant. `captured`: all of it
    is made a CUDA graph of, so that XLA is to make none."""

    function: Any
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()
    often: bool = False
    captured: bool = False


Recipe = Callable[[], Jitted]
Make = Callable[[Recipe], Any]


# XLA times kernels on the device to choose among them: whoever is served there meanwhile would wait for these.
UNTIMED: Mapping[str, Any] = {"xla_gpu_autotune_level": 0}
# When a program with a CUDA graph of XLA's is loaded it drops those of all others in the process, each of which has one
# again after two slow runs. So what runs once for a tenant has none.
WITHOUT_GRAPH: Mapping[str, Any] = OPTIONS


def make_here(recipe: Recipe, options: Mapping[str, Any] | None = None) -> Any:
    """For the default device."""
    with only(default_device().client.platform):
        jitted = recipe()
        lowered = jitted.function.lower(*jitted.arguments)
    return lowered.compile(compiler_options=told(jitted, options))


def told(jitted: Jitted, options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the compiler is; nothing but `options` where these are none, as on a CPU, and a graph is not asked for."""
    if jitted.captured:
        return {**(options or {}), **WITHOUT_GRAPH}
    if not options:
        return None
    return {**options, **({} if jitted.often else WITHOUT_GRAPH)}
