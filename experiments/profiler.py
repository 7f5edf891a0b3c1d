"""What a GPU did, launch by launch, from the JAX profiler's trace: all kernels of this process, PyTorch's too."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData, ProfileOptions

PAUSE_S = 0.04  # with the device idle, between two runs of a trace; a host is rarely this slow to dispatch a round
ATTEMPTS = 3


class Launch(NamedTuple):
    """A kernel or a copy on one of the device's streams; the start counts from anywhere."""

    name: str
    start_us: float
    us: float


class Busy(Exception):
    """The host was too slow to keep a trace's runs apart."""


def rounds_of(runs: Sequence[Callable[[int], Any]], rounds: int) -> list[list[list[Launch]]]:
    """For each run the launches of each of its rounds: run(0), run(1), ..., dispatched in a row.

    A launch does not say which call it belongs to: the runs are told apart by a pause between them, and the rounds of a
    run, which are equal programs, by their number of launches.

    Raises:
      Busy: three traces in a row made no sense, because others keep the host from dispatching in time.
    """
    for run in runs:
        jax.block_until_ready([run(i) for i in range(3)])
    for _ in range(ATTEMPTS):
        with traced() as launches:
            for run in runs:
                time.sleep(PAUSE_S)
                for i in range(rounds):
                    result = run(i)
                jax.block_until_ready(result)
        apart = split(launches)
        if len(apart) == len(runs) and all(len(part) % rounds == 0 for part in apart):
            return [
                [part[i : i + len(part) // rounds] for i in range(0, len(part), len(part) // rounds)] for part in apart
            ]
    raise Busy(f"{ATTEMPTS} traces of {len(runs)} programs fell apart otherwise; try again when the machine is idle")


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


def split(launches: Sequence[Launch]) -> list[list[Launch]]:
    """Launches, ordered by start, cut where the device stood idle for half a pause."""
    parts: list[list[Launch]] = []
    end = float("-inf")
    for launch in launches:
        if launch.start_us - end > PAUSE_S / 2 * 1e6:
            parts.append([])
        parts[-1].append(launch)
        end = max(end, launch.start_us + launch.us)
    return parts


def total(launches: Sequence[Launch]) -> float:
    """Microseconds, of all launches."""
    return sum(launch.us for launch in launches)


def span(launches: Sequence[Launch]) -> float:
    """Microseconds from the start of the first launch to the end of the last."""
    return max(launch.start_us + launch.us for launch in launches) - launches[0].start_us
