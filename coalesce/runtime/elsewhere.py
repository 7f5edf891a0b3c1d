"""A policy in a process of its own, so that what it thinks about keeps nobody from serving.

A policy is told something for every bundle that ends and for all requests that have come since, and takes longer to
answer than everything else that Python does for a bundle. In the process that serves it has the interpreter's lock all
that time. Elsewhere it has a processor and a lock of its own: the driver's thread waits for its answer as it would wait
for a device, and the finisher and whoever sends requests work meanwhile. It decides the same, some 0.1 ms later.

    with coalesce.Runtime(policy=Elsewhere) as rt: ...

    message   size, then pickled: what makes the policy, and `awake_s`; then (event, time), over and over
    answer    size, then pickled: commands, or what the policy raised

It ends with its input, so that it never outlives who started it.
"""

from __future__ import annotations

import gc
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence

from coalesce.runtime.compiler import read, write
from coalesce.runtime.frozen import RARELY, SELDOM
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import Event
from coalesce.scheduler.policy import Policy


class Elsewhere:
    """Decides as the policy does that `make` makes, a function that can be pickled. After each answer it looks for
    `awake_s` whether there is more to decide, before it sleeps: to be woken up takes long."""

    def __init__(self, make: Callable[[], Policy] = Coalescing, awake_s: float = 0.0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "coalesce.runtime.elsewhere"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        self.close = weakref.finalize(self, end, self._process)
        assert self._process.stdin is not None and self._process.stdout is not None, "the policy has no pipes"
        self._to, self._from = self._process.stdin, self._process.stdout
        write(self._to, (make, awake_s))

    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        write(self._to, (event, now_ns))
        answer = read(self._from)
        if isinstance(answer, list):
            return answer
        raise answer or EOFError(f"the process of the policy ended with {self._process.wait()}")


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def main() -> None:
    told, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints is no answer
    make, awake_s = read(told)
    policy = make()
    gc.freeze()
    gc.set_threshold(RARELY, 10, SELDOM)  # as in the process that serves
    while (asked := read(told)) is not None:
        try:
            answer = list(policy.on_event(*asked))
        except Exception as e:
            answer = e
        write(answers, answer)
        until_s = time.perf_counter() + awake_s
        while time.perf_counter() < until_s and not select.select([told], [], [], 0)[0]:
            continue


if __name__ == "__main__":
    main()
