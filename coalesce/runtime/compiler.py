"""The other end of coalesce.runtime.apart: reads exported programs from its standard input, and writes what XLA made.

    request   size, then pickled (program, donated arguments, number of the device that it is for)
    answer    size, then pickled ("made", (executable, trees of arguments and results)), or ("failed", why)

It ends with its input, so that it never outlives who started it. Started as `idle` it runs only while nobody else wants
to, where the system has such a class: a niced process may keep its processor for milliseconds when somebody wakes up.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
from typing import Any, IO

LESS_URGENT = 10  # than who serves: the highest would get nothing where others leave nothing
IDLE = "idle"
SIZE = struct.Struct("<q")


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


def compiled(program: bytes, donated: tuple[int, ...], number: int) -> Any:
    import jax  # not before `main` has stepped back: to load it takes seconds
    from jax import export
    from jax.experimental.serialize_executable import serialize

    exported = export.deserialize(bytearray(program))
    structs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in exported.in_avals]
    arguments, _ = jax.tree.unflatten(exported.in_tree, structs)
    devices = {own.id: own for own in jax.devices()}
    if number not in devices:  # an executable knows which one it is for
        raise LookupError(f"there is no device {number}")
    with jax.default_device(devices[number]):
        made = jax.jit(exported.call, donate_argnums=donated).lower(*arguments).compile()
    return serialize(made)


def answer(program: bytes, donated: tuple[int, ...], number: int) -> tuple[str, Any]:
    try:
        return "made", compiled(program, donated, number)
    except Exception as e:
        return "failed", f"{type(e).__name__}: {e}"


def main() -> None:
    os.nice(LESS_URGENT)
    if IDLE in sys.argv:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    given, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints is no answer
    while (request := read(given)) is not None:
        write(answers, answer(*request))


if __name__ == "__main__":
    main()
