"""Compiling in a process of its own, so that it takes no time from who serves.

XLA's compiler for CPUs works on the threads that programs run on, and at their priority: whoever is asked for anything
meanwhile would wait for it. What comes before, the passes over a program, tracing and lowering, takes the interpreter's
lock from who serves. So the other process gets the recipe (coalesce.serving.making) with the tenants' jaxprs in it, and
gives the executable back. What cannot be brought there so (`dumps` in coalesce.jaxpr says what) is traced and lowered
here, and goes there as JAX exports it.

It is started when it is first needed, takes the time that others leave, and ends with this one; where they leave none,
another is started that takes a little. Where it cannot be used, what it was asked for is compiled here: a program that
calls back into Python belongs to its process, and some platforms have no other.

For a GPU the other process has a context of its own there, which takes some hundred megabytes, and runs nothing on it:
kernels are not timed (`UNTIMED`), and memory is taken as it is needed. Where it gets no context, or what it makes
cannot be loaded here, other than for want of memory, there is none from then on.
"""

from __future__ import annotations

import gc
import importlib
import logging
import math
import os
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing import connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jax.experimental.serialize_executable import deserialize_and_load

from coalesce import jaxpr as J
from coalesce.errors import Shutdown
from coalesce.runtime.compiler import read, settings, write
from coalesce.runtime.second import Compiler, end, is_wanted, PLUGINS, started
from coalesce.serving.making import Recipe

PATIENCE_S = 10.0  # while it is at work for somebody else
BRIEF_S = 3.0  # for what takes no compiler
STARVED_S = 5.0  # that it gets less than SHARE of a processor for
SHARE = 0.2
STUCK_S, NOTHING = 60.0, 0.001  # and the same of one that takes a little: it hangs

LAPACK = b"lapack_"  # in an executable that calls a function of it

LOG = logging.getLogger("coalesce.runtime")


class Apart:
    """One compiler for a runtime; those who want something wait for each other, but not for long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Compiler | None = None
        self._is_useless = self._is_closed = False
        self._is_idle = hasattr(os, "SCHED_IDLE")  # it takes only what others leave
        self._platforms = {"cpu"}  # that it is started with

    def takes_on(self, device: Any) -> bool:
        """Whether it compiles for a device, of which it is told before it is started."""
        if not is_wanted(device):
            return False
        if device.platform == "gpu":
            find_mosaic()
        self._platforms.add(PLUGINS[device.platform])
        return True

    def compile(self, device: Any, recipe: Recipe, options: Mapping[str, Any] | None = None) -> Any:
        """What `make_here` makes of it, or None if it cannot be made there."""
        if self._is_useless:
            return None
        at = device.platform, device.id
        try:
            made = self._answer("compile", J.dumps((recipe, at, options)), PATIENCE_S)
        except J.Uncarried as e:
            LOG.info("traced where it is served: %s", e)
            made = self._compile_traced(recipe, at, options)
        if made is None:
            return None
        try:
            if LAPACK in made[0]:
                find_lapack()
            return deserialize_and_load(*made, backend=device.client, execution_devices=[device])
        except Exception as e:  # it is for another processor, or another device
            LOG.info("compiled where it is served, since what was made cannot be loaded: %s: %s", type(e).__name__, e)
            # To make it took long; where there was no memory to load it, there may be some for the next.
            if device.platform != "cpu" and "RESOURCE_EXHAUSTED" not in str(e):
                self._give_up(f"a {device.platform} does not load what it makes")
            return None

    def _compile_traced(self, recipe: Recipe, at: tuple[str, int], options: Mapping[str, Any] | None) -> Any:
        try:
            jitted = recipe()
            program = exported(jitted.function, jitted.arguments)
        except Exception as e:  # it depends on this process
            LOG.info("compiled where it is served: %s: %s", type(e).__name__, str(e)[:200])
            return None
        request = pickle.dumps((program, jitted.donated, jitted.often, at, options))
        return self._answer("compile_exported", request, PATIENCE_S)

    def call(
        self, function: Callable[..., Any], *given: Any, known: Sequence[object] = (), inlined: bool = False
    ) -> Any:
        """What a function returns, with the objects of `known` as they are; None if it cannot be called there, or
        raises. `inlined` as in `dumps`."""
        if self._is_useless:
            return None
        try:
            request = J.dumps((function, given, known), inlined=inlined)
        except J.Uncarried as e:
            LOG.info("done where it is served: %s", e)
            return None
        answer = self._answer("call", request, BRIEF_S)
        try:
            return None if answer is None else J.loads(answer, known)
        except Exception as e:
            LOG.info("done where it is served, since what was done cannot be loaded: %s: %s", type(e).__name__, e)
            return None

    def _answer(self, what: str, request: bytes, patience_s: float) -> Any:
        """None if there is no use in asking, or nothing came of it."""
        if not self._lock.acquire(timeout=patience_s):
            return None
        try:
            answer = self._asked((what, request, settings()))
        finally:
            self._lock.release()
        if answer is None:
            return None
        kind, found = answer
        if kind == "useless":
            self._give_up(found)
            return None
        if kind == "failed":  # if it is the program's fault it fails here too, and says so
            LOG.info("%s where it is served: %s", "done" if what == "call" else "compiled", found)
            return None
        return found

    def _asked(self, request: Any) -> tuple[str, Any] | None:
        if self._is_useless:
            return None
        try:
            return self._ask(request)
        except (OSError, EOFError, ValueError) as e:
            if self._is_closed:
                raise Shutdown("the runtime was closed") from None
            self._give_up(f"{type(e).__name__}: {e}")
            return None
        except BaseException:  # Ctrl-C: what it still answers would be taken for an answer to the next request
            process, self._process = self._process, None
            if process is not None:
                end(process)
            raise

    def _give_up(self, why: str) -> None:
        """For good, and nothing is kept of a device for it."""
        if self._is_useless:  # whoever waited for it is told too
            return
        self._is_useless = True
        LOG.warning("there is no compiler in a process of its own: %s", why)
        process, self._process = self._process, None
        if process is not None:
            end(process)

    def _ask(self, request: Any) -> tuple[str, Any]:
        process = self._sent(request)
        if self._is_idle and is_starved(process, STARVED_S, SHARE):
            LOG.info("others leave the compiler no time: it is started anew, to take some")
            self._is_idle = False
            end(process)
            self._process = None
            process = self._sent(request)
        if not self._is_idle and is_starved(process, STUCK_S, NOTHING):
            end(process)
            raise EOFError(f"it did nothing for {STUCK_S:g} s")
        assert process.stdout is not None, "the compiler has no pipes"
        answer = read(process.stdout)
        if answer is None:
            raise EOFError(f"it ended with {process.poll()}")
        return answer

    def _sent(self, request: Any) -> Compiler:
        """To whom."""
        if self._process is None:
            self._process = started(self._is_idle, self._platforms)
        process = self._process
        if self._is_closed:
            end(process)
        # A pipe holds little: to write what one that hangs does not read would take for ever.
        threading.Thread(target=send, args=(process, request), name="coalesce-compiler-asked", daemon=True).start()
        return process

    def close(self) -> None:
        """What it is at work on is lost."""
        self._is_closed = self._is_useless = True
        process = self._process
        if process is not None:
            end(process)


def exported(jitted: Any, arguments: tuple[Any, ...]) -> bytes:
    """JAX leaves its module of an export in a cycle of references, and to take one apart keeps the interpreter's lock
    for most of a millisecond: here, and not whoever collects garbage next, such as the driver, for all of them."""
    try:
        return bytes(export.export(jitted)(*arguments).serialize())
    finally:
        gc.collect(0)


@cache
def find_lapack() -> None:
    """JAX looks for it when it lowers the first program that calls it, as the other process did. To call what was not
    found ends this one."""
    jax.jit(jax.lax.linalg.cholesky).lower(jax.ShapeDtypeStruct((1, 1), np.float32))


def find_mosaic() -> None:
    """Mosaic's kernels are made once more where they are loaded, by a library that JAX names when this is imported, and
    it is here only where one was lowered. Now, since it takes half a second and nobody is served yet."""
    with suppress(ImportError):
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def send(process: Compiler, request: Any) -> None:
    """Whoever waits for the answer of one that has ended is told."""
    assert process.stdin is not None, "the compiler has no pipes"
    with suppress(OSError, ValueError):
        write(process.stdin, request)


def is_starved(process: Compiler, window_s: float, share: float) -> bool:
    """Waits until it answers, or ends; True once it gets less than a share of a processor for so long."""
    assert process.stdout is not None, "the compiler has no pipes"
    used_s = processor_s(process.pid)
    answers = process.stdout.fileno()  # may be 1,024 or more, which `select` does not take
    while not connection.wait([answers], window_s):
        before_s, used_s = used_s, processor_s(process.pid)
        if used_s - before_s < share * window_s:
            return True
    return False


def processor_s(pid: int) -> float:
    """What all its threads have had so far, and what they started and has ended; endless where nobody says."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, after_name[11:15])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return math.inf
