"""The other end of coalesce.runtime.apart: reads requests from its standard input, and writes what came of them.

    request   size, then pickled (what, what for, settings)
        "compile"            a recipe, the device that it is for (its platform and number), options of the compiler
        "compile_exported"   an exported program, its donated arguments and whether it runs often, the same two
        "call"               a function, what it takes, and objects that the other end has
    answer    size, then pickled ("made", it), ("failed", why), or ("useless", why): so will all others

What was compiled goes back as (executable, trees of arguments and results). Everything is done under the settings of
JAX that whoever asks has. It ends with its input, so that it never outlives who started it. Started as `idle` it runs
only while nobody else wants to, where the system has such a class, and something ticks meanwhile, which is told by the
file of the number after it (coalesce.runtime.ticks): a niced process may keep its processor for milliseconds when
somebody wakes up.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, IO

from coalesce.runtime.ticks import BEGIN, STOP, telling

LESS_URGENT = 10  # than who serves: the highest would get nothing where others leave nothing
IDLE = "idle"
SIZE = struct.Struct("<q")
OWN = ("cache", "platform", "device", "distributed", "dump", "log", "profil", "debug", "coordination")


def read(stream: IO[bytes]) -> Any:
    """None at the end, also in the middle of a message."""
    head = stream.read(SIZE.size)
    if len(head) < SIZE.size:
        return None
    (size,) = SIZE.unpack(head)
    content = stream.read(size)
    return pickle.loads(content) if len(content) == size else None


def write(stream: IO[bytes], message: Any) -> None:
    content = pickle.dumps(message)
    stream.write(SIZE.pack(len(content)) + content)
    stream.flush()


def settings() -> dict[str, Any]:
    """What JAX is told in this thread that may change what a program becomes. Not what of it is a process's own."""
    import jax  # not before `main` has stepped back: to load it takes seconds

    return {
        name: value
        for name, value in jax.config.values.items()
        if isinstance(value, bool | int | float | str | None) and not any(part in name for part in OWN)
    }


def under(told: dict[str, Any]) -> None:
    """Settings as there."""
    import jax

    mine = settings()
    for name, value in told.items():
        if name in mine and mine[name] != value:
            jax.config.update(name, value)


class Useless(Exception):
    """This process has no devices like those of whoever asks."""


def compile(carried: bytes) -> Any:
    from coalesce.jaxpr import loads

    recipe, at, options = loads(carried)
    device = device_at(*at)  # before anything is lowered, which may look at it
    with on(device):
        return executable(recipe(), options)


def compile_exported(carried: bytes) -> Any:
    import jax
    from jax import export

    from coalesce.serving.making import Jitted

    program, donated, often, at, options = pickle.loads(carried)
    exported = export.deserialize(bytearray(program))
    structs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in exported.in_avals]
    arguments, _ = jax.tree.unflatten(exported.in_tree, structs)
    with on(device_at(*at)):
        return executable(Jitted(jax.jit(exported.call, donate_argnums=donated), arguments, donated, often), options)


def device_at(platform: str, number: int) -> Any:
    import jax

    try:
        devices = {own.id: own for own in jax.devices(platform)}
    except RuntimeError as e:
        raise Useless(str(e)) from None
    if number not in devices:  # an executable knows which one it is for
        raise LookupError(f"there is no device {number}")
    return devices[number]


def on(device: Any) -> Any:
    import jax

    # What JAX reads from its cache lacks its code when it is serialized again, and fails as soon as it runs.
    jax.config.update("jax_enable_compilation_cache", False)
    return jax.default_device(device)


def executable(jitted: Any, options: Any) -> Any:
    from jax.experimental.serialize_executable import serialize

    from coalesce.serving.making import make_here

    return serialize(make_here(lambda: jitted, options))


def call(carried: bytes) -> bytes:
    from coalesce.jaxpr import dumps, loads

    function, given, known = loads(carried)
    return dumps(function(*given), known)


does: dict[str, Callable[[bytes], Any]] = {"compile": compile, "compile_exported": compile_exported, "call": call}


def answer(what: str, request: bytes, told: dict[str, Any]) -> tuple[str, Any]:
    try:
        under(told)
        return "made", does[what](request)
    except Useless as e:
        return "useless", str(e)
    except Exception as e:
        return "failed", f"{type(e).__name__}: {e}"


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for who serves
    idle, number = [*sys.argv[1:], None, None][:2]
    tell = telling(number)
    os.nice(LESS_URGENT)
    if idle == IDLE:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    given, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints is no answer
    while (request := read(given)) is not None:
        tell(BEGIN)
        write(answers, answer(*request))
        tell(STOP)


if __name__ == "__main__":
    main()
