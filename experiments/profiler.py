"""What a GPU did, launch by launch, from the JAX profiler's trace: all kernels of this process, PyTorch's too."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from coalesce.measuring.profile import (
    Launch as Launch,
    launches as launches,
    span as span,
    total as total,
    traced as traced,
)

PAUSE_S = 0.04  # with the device idle, between two runs of a trace; a host is rarely this slow to dispatch a round


class Line(NamedTuple):
    """A kernel of a round."""

    name: str
    times: float  # launches a round
    us: float  # a round, of all of them


def rounds_of(runs: Sequence[Callable[[int], Any]], rounds: int) -> list[list[list[Launch]]]:
    """For each run the launches of each of its rounds: run(0), run(1), ..., dispatched in a row.

    A launch does not say which call it belongs to: the runs are told apart by a pause between them, and the rounds of a
    run, which are equal programs, by their number of launches. Where a slow host spoils the pauses, each run has a
    trace of its own. A run whose launches are no equal rounds has none.
    """
    for run in runs:
        jax.block_until_ready([run(i) for i in range(3)])
    apart = split(launches_of(runs, rounds))
    if len(apart) != len(runs) or any(len(part) % rounds for part in apart):
        apart = [launches_of([run], rounds) for run in runs]
    return [equal_parts(part, rounds) for part in apart]


def launches_of(runs: Sequence[Callable[[int], Any]], rounds: int) -> list[Launch]:
    with traced() as launches:
        for run in runs:
            time.sleep(PAUSE_S)
            for i in range(rounds):
                result = run(i)
            jax.block_until_ready(result)
    return launches


def equal_parts(launches: Sequence[Launch], count: int) -> list[list[Launch]]:
    size, rest = divmod(len(launches), count)
    return [] if rest or not size else [list(launches[i * size : (i + 1) * size]) for i in range(count)]


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


def lines(launches: Sequence[Launch], rounds: int) -> list[Line]:
    """By time, the longest first."""
    count: Counter[str] = Counter()
    us: defaultdict[str, float] = defaultdict(float)
    for launch in launches:
        count[launch.name] += 1
        us[launch.name] += launch.us
    found = [Line(name, count[name] / rounds, own / rounds) for name, own in us.items()]
    return sorted(found, key=lambda line: (-line.us, line.name))


def gaps(launches: Sequence[Launch]) -> list[Line]:
    """Where the device stands idle between launches, ordered by start: what it waits for, and how long each time."""
    found: list[Line] = []
    end = launches[0].start_us if launches else 0.0
    for launch in launches:
        if launch.start_us > end:
            found.append(Line(launch.name, 1, launch.start_us - end))
        end = max(end, launch.start_us + launch.us)
    return found
