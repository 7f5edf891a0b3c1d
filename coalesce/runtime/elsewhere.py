"""A policy in a process of its own, so that what it thinks about keeps nobody from serving.

A policy is told something for every bundle that ends and for all requests that have come since, and takes longer to
answer than everything else that Python does for a bundle. In the process that serves it has the interpreter's lock all
that time. Elsewhere it has a processor and a lock of its own: the driver's thread waits for its answer as it would wait
for a device, and the finisher and whoever sends requests work meanwhile. It decides the same, some 0.1 ms later.

    with coalesce.Runtime(policy=Elsewhere) as rt: ...

    argument  pickled, in hexadecimal: what makes the policy, and `awake_s`
    message   size, then pickled: (events, time); the next one comes after the answer
    answer    size, then pickled: the commands upon each event, or what the policy raised

It ends with its input, so that it never outlives who started it.
"""

from __future__ import annotations

import gc
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from coalesce.errors import PolicyError
from coalesce.runtime.companion import command, search_path
from coalesce.runtime.frozen import RARELY, SELDOM
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import Event
from coalesce.scheduler.policy import Policy

SIZE = struct.Struct("<q")
MUCH = 65_536  # bytes: a pipe holds no more


class Elsewhere:
    """Decides as the policy does that `make` makes, a function that can be pickled. After each answer it looks for
    `awake_s` whether there is more to decide, before it sleeps: to be woken up takes long."""

    def __init__(self, make: Callable[[], Policy] = Coalescing, awake_s: float = 0.0) -> None:
        self._process = subprocess.Popen(
            command("coalesce.runtime.elsewhere", pickle.dumps((make, awake_s)).hex()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": search_path()},
            start_new_session=True,  # Ctrl-C is for who serves, and may want to serve what waits before it ends
        )
        self._asking = threading.Lock()
        self.close = weakref.finalize(self, end, self._process, self._asking)
        assert self._process.stdin is not None and self._process.stdout is not None, "the policy has no pipes"
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()

    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        (commands,) = self.on_events([event], now_ns)
        return commands

    def on_events(self, events: Sequence[Any], now_ns: int) -> Sequence[Sequence[Command]]:
        """Those upon each: what is told together is asked once. Events are whatever the policy there takes for one.

        Raises:
          PolicyError: the process has ended. What the policy itself raised is raised here.
        """
        with self._asking:
            if not self.close.alive:
                raise PolicyError("the policy's process was ended")
            try:
                send(self._to, (events, now_ns))
                answer = receive(self._from)
            except BrokenPipeError:
                answer = None
            except OSError as e:
                raise PolicyError(f"the policy's process cannot be asked: {e}") from e
        if isinstance(answer, list):
            return answer
        raise answer or PolicyError(f"the policy's process has ended, with {self._process.wait()}. Restart the runtime")


def end(process: subprocess.Popen[bytes], asking: threading.Lock) -> None:
    """Whoever waits for its answer is told first: he reads by the number of a file, and others get it next."""
    process.kill()
    process.wait()
    with asking:
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None, "the policy has no pipes"
            pipe.close()


def send(to: int, message: Any) -> None:
    """In one call of the system, mostly: each gives the interpreter's lock away."""
    content = pickle.dumps(message)
    left = SIZE.pack(len(content)) + content
    while left:
        left = left[os.write(to, left) :]


def receive(source: int) -> Any:
    """Of who sends one message at a time. None at the end, also in the middle of a message."""
    parts = [os.read(source, MUCH)]
    if len(parts[0]) < SIZE.size:
        return None
    (size,) = SIZE.unpack_from(parts[0])
    left = SIZE.size + size - len(parts[0])
    while left:
        parts.append(os.read(source, min(left, MUCH)))
        if not parts[-1]:
            return None
        left -= len(parts[-1])
    return pickle.loads(memoryview(b"".join(parts))[SIZE.size :])


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what anybody prints is no answer
    make, awake_s = pickle.loads(bytes.fromhex(sys.argv[1]))
    policy = make()
    gc.freeze()
    gc.set_threshold(RARELY, 10, SELDOM)  # as in the process that serves
    while (told := receive(0)) is not None:
        events, now_ns = told
        try:
            answer = [list(policy.on_event(event, now_ns)) for event in events]
        except Exception as e:
            answer = e
        send(answers, answer)
        until_s = time.perf_counter() + awake_s
        while time.perf_counter() < until_s and not select.select([0], [], [], 0)[0]:
            continue


if __name__ == "__main__":
    main()
