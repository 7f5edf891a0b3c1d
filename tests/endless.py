"""Serves so many requests, and prints by how many bytes the process grew after the first tenth of them.

    python -m tests.endless 20000 1            on the machine without JAX, of a program in one segment
    python -m tests.endless 20000 3 leak       in three, with an observer that keeps the inputs of every request
    python -m tests.endless 1000000 1 jax      the runtime with a small model

All decisions are checked meanwhile.
"""

from __future__ import annotations

import gc
import resource
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coalesce.runtime.observer import Observer
from coalesce.runtime.ticket import Ending

AHEAD = 64
TENANTS = 4


class Leak(Observer):
    """What an observer must not do."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def ended(self, endings: Sequence[Ending], now_ns: int) -> None:
        self.kept += (ending.ticket.inputs for ending in endings)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextmanager
def fake(observers: Sequence[Observer], segments: int) -> Any:
    from tests.fake_machine import FakeMachine, Served

    machine = FakeMachine(takes_s=0.00001, segments=segments)
    machine.launches = deque(maxlen=1)  # pyright: ignore[reportAttributeAccessIssue]
    with Served(machine, slo_s=60.0, observers=observers) as served:
        yield lambda i: served.submit(f"t{i % TENANTS}", bytes(4096))


@contextmanager
def real(observers: Sequence[Observer], segments: int) -> Any:
    import numpy as np

    from tests.checked import checked_runtime

    with checked_runtime(observers, widths=(1, 2, 4, 8), segments=segments, compiled=False) as rt:
        for i in range(TENANTS):
            weight = np.full((1, 1024), i, np.float32)
            rt.add_tenant(f"t{i}", lambda w, x: (w + x) * 2 - x - w, weight, example=(weight,), slo=60.0)
        rt.warm_up(120.0)
        yield lambda i: rt.submit(f"t{i % TENANTS}", np.full((1, 1024), i, np.float32))


def serve(submit: Callable[[int], Any], count: int) -> None:
    sent: deque[Any] = deque()
    for i in range(count):
        sent.append(submit(i))
        if len(sent) >= AHEAD:
            sent.popleft().result(60)
    for reply in sent:
        reply.result(60)


def main(count: int, segments: int, *kinds: str) -> None:
    observers = [Leak()] if "leak" in kinds else []
    with (real if "jax" in kinds else fake)(observers, segments) as submit:
        serve(submit, count // 10)
        gc.collect()
        before = resident()
        serve(submit, count - count // 10)
        gc.collect()
        print(resident() - before)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
