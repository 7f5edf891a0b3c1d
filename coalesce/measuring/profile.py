"""Microseconds of kernels on a GPU, from the profiler's trace: what the device does, without dispatch.

Several programs are measured in one trace, since starting one takes long. A kernel of ours with a name of its own runs
between them, so that what lies between two of these is one program's, whatever XLA calls its kernels. What a program
reads is made anew before each run: in a network another kernel has just left it, and some of it in a cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData, ProfileOptions

from coalesce.errors import TuningError
from coalesce.kernels.triton import launch

MARK = "coalesce_mark"


class Launch(NamedTuple):
    """A kernel or a copy on one of the device's streams; the start counts from anywhere."""

    name: str
    start_us: float
    us: float


@contextmanager
def traced() -> Iterator[list[Launch]]:
    """Collects the launches of its block, by start; they are there when it ends."""
    found: list[Launch] = []
    options = ProfileOptions()
    options.python_tracer_level = 0  # Python's calls would be most of the trace
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            yield found
        (path,) = Path(folder).rglob("*.xplane.pb")
        found += sorted(launches(ProfileData.from_file(str(path))), key=lambda launch: launch.start_us)


def launches(data: Any) -> Iterator[Launch]:
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                yield from (Launch(event.name, event.start_ns / 1e3, event.duration_ns / 1e3) for event in line.events)


def total(launches: Sequence[Launch]) -> float:
    """Microseconds, of all launches."""
    return sum((launch.us for launch in launches), 0.0)


def span(launches: Sequence[Launch]) -> float:
    """Microseconds from the start of the first launch, by which they are ordered, to the end of the last."""
    return max(launch.start_us + launch.us for launch in launches) - launches[0].start_us if launches else 0.0


def kernels_us(
    programs: Sequence[Callable[[int, Any], Any]],
    operands: Callable[[], Any],
    rounds: int = 5,
    measure: Callable[[Sequence[Launch]], float] = total,
) -> list[float]:
    """The median, for each program, of what the kernels of a run take together, or of another measure of them.

    Args:
      programs: each gets the number of the run, and what `operands` has just made.
      operands: the work of making them does not count.
    """
    mark = marker()
    for program in programs:
        jax.block_until_ready(program(0, operands()))
    runs = rounds * len(programs)
    with traced() as found:
        for i in range(runs):
            made = jax.block_until_ready(operands())
            jax.block_until_ready(mark())
            jax.block_until_ready(programs[i % len(programs)](i, made))
            jax.block_until_ready(mark())
    times = [measure(own) for own in between_marks(found)]
    if len(times) != 2 * runs:
        raise TuningError(f"the profiler's trace has {len(times)} marks for {runs} runs, two for each; try again")
    return [median(times[1::2][i :: len(programs)]) for i in range(len(programs))]


def between_marks(found: Sequence[Launch]) -> list[list[Launch]]:
    """What was launched before each mark, since the mark before it."""
    runs: list[list[Launch]] = []
    own: list[Launch] = []
    for launched in found:
        if MARK in launched.name:
            runs.append(own)
            own = []
        else:
            own.append(launched)
    return runs


def marker() -> Callable[[], Any]:
    """A compiled program of one kernel called MARK."""

    def kernel(x_ref: Any, y_ref: Any) -> None:
        y_ref[...] = x_ref[...]

    x = jnp.zeros(16, jnp.float32)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    marked = jax.jit(lambda x: launch(kernel, (1,), [out], [x], name=MARK, warps=1, stages=1))
    compiled = marked.lower(x).compile()
    return lambda: compiled(x)
