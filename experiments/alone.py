"""The machine for one process alone, while it times; experiments/beside.py starts the processes and grants the turns.

A process that nobody granted anything just goes on: it is alone already, or its user knows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

TURNS = "COALESCE_EXPERIMENT_TURNS"  # two file descriptors: where to ask, and where to read that all others stand still
ASK, GRANTED, DONE = b"?", b"!", b"."


@contextmanager
def alone() -> Iterator[None]:
    """Every other process of the same run is stopped while this lasts; waits until it is."""
    if not (given := turns()):
        yield
        return
    ask, granted = given
    os.write(ask, ASK)
    if os.read(granted, 1) != GRANTED:
        raise RuntimeError("the process that grants turns has ended")
    try:
        yield
    finally:
        os.write(ask, DONE)


def turns() -> tuple[int, ...]:
    """The file descriptors to hand on to a process that times for this one; none if it need not ask."""
    return tuple(map(int, os.environ.get(TURNS, "").split()))
