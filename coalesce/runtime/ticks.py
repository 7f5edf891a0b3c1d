"""Wakes up for a moment on every processor, again and again, while the compiler beside it is at work.

    python -m coalesce.runtime.ticks      reads lines, b"1" to begin and b"0" to stop, and ends with its input

The compiler's process takes what others leave: it is of the class SCHED_IDLE, and whoever wakes up has its processor at
once. Linux shares that processor fairly all the same, by a weight of 3 to 1,024 (EEVDF, since 6.6). So one who has had
more than that since he woke up is not due: preempted by another thread of his own program, or woken up again soon after
he slept, he waits while the compiler runs, until somebody else wakes up there or the next tick comes, after 4 ms at 250
a second, even where another processor is free. Three in a hundred requests waited so, most of them for the driver.
Whoever wakes up next has Linux choose again, and by then the compiler is not due: so here is somebody, every EVERY_S.

It is of the class SCHED_BATCH, which preempts what is idle and nobody else, and takes some 2% of each processor. It is
no thread of the compiler's, which would wait for the interpreter's lock, nor started by it once that is idle: nobody
without privileges comes back from that. So who serves starts it, and waits for its end: nobody else would, where who
serves is process 1. On more than FEW processors there is none: who serves finds a free one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from coalesce.runtime.companion import command
from coalesce.runtime.gil import set_timer_slack

EVERY_S = 2.5e-4
FEW = 8
BEGIN, STOP = b"1\n", b"0\n"


def started(env: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
    """One that a compiler, started next, is to tell; None where it is not needed, or cannot be started."""
    if len(os.sched_getaffinity(0)) > FEW:
        return None
    pipe, ticking = subprocess.PIPE, command("coalesce.runtime.ticks")
    with suppress(OSError):
        return subprocess.Popen(ticking, stdin=pipe, stdout=subprocess.DEVNULL, env=env)
    return None


def telling(number: str | None) -> Callable[[bytes], None]:
    """What gives orders to who reads the file of this number; they are lost where nothing ticks."""

    if number is None:
        return lambda order: None
    to = int(number)

    def tell(order: bytes) -> None:
        with suppress(OSError):  # it has ended
            os.write(to, order)

    return tell


def tick(processor: int, at_work: threading.Event) -> None:
    try:
        os.sched_setaffinity(0, {processor})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:  # it is not allowed here
        return
    set_timer_slack(1)
    while True:
        at_work.wait()
        time.sleep(EVERY_S)


def follow(orders: Iterable[bytes], at_work: threading.Event) -> None:
    for order in orders:
        if order == BEGIN:
            at_work.set()
        else:
            at_work.clear()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for who serves
    at_work = threading.Event()
    for processor in os.sched_getaffinity(0):
        threading.Thread(target=tick, args=(processor, at_work), daemon=True).start()
    follow(sys.stdin.buffer, at_work)


if __name__ == "__main__":
    main()
