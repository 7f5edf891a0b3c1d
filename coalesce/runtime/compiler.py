"""The other end of coalesce.runtime.apart: reads requests from its standard input, and writes what came of them.

    request   size, then pickled (what, what for, settings)
        "compile"            a recipe, and the number of the device that it is for
        "compile_exported"   an exported program, its donated arguments, the device
        "call"               a function, what it takes, and objects that the other end has
    answer    size, then pickled ("made", it), or ("failed", why)

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


def compile(carried: bytes) -> Any:
    from coalesce.jaxpr import loads

    recipe, number = loads(carried)
    jitted = recipe()
    return executable(jitted.function, jitted.arguments, number)


def compile_exported(carried: bytes) -> Any:
    import jax
    from jax import export

    program, donated, number = pickle.loads(carried)
    exported = export.deserialize(bytearray(program))
    structs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in exported.in_avals]
    arguments, _ = jax.tree.unflatten(exported.in_tree, structs)
    return executable(jax.jit(exported.call, donate_argnums=donated), arguments, number)


def executable(function: Any, arguments: Any, number: int) -> Any:
    import jax
    from jax.experimental.serialize_executable import serialize

    devices = {own.id: own for own in jax.devices()}
    if number not in devices:  # an executable knows which one it is for
        raise LookupError(f"there is no device {number}")
    # What JAX reads from its cache lacks its code when it is serialized again, and fails as soon as it runs.
    jax.config.update("jax_enable_compilation_cache", False)
    with jax.default_device(devices[number]):
        return serialize(function.lower(*arguments).compile())


def call(carried: bytes) -> bytes:
    from coalesce.jaxpr import dumps, loads

    function, given, known = loads(carried)
    return dumps(function(*given), known)


does: dict[str, Callable[[bytes], Any]] = {"compile": compile, "compile_exported": compile_exported, "call": call}


def answer(what: str, request: bytes, told: dict[str, Any]) -> tuple[str, Any]:
    try:
        under(told)
        return "made", does[what](request)
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
