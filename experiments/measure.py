"""Interleaved timing: contenders take turns, so that a busy or throttled machine is unfair to none of them.

In a repeat every contender has one turn, and the next repeat starts with the next contender. A turn is one round that
is not timed, which brings the contender's own code and weights back into the caches, and one that is: host time from
the first dispatch of a round until the last of its results is ready. JAX's arrays are waited for by CUDA's driver,
whoever computed them, as PyTorch waits (coalesce/waiting.py).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from coalesce import block_until_ready
from coalesce.measuring.in_program import timed
from experiments.alone import alone

Key = TypeVar("Key")  # what the caller calls a contender
Round = Callable[[], Any]  # dispatches a round's work and returns its outputs, without waiting for them


@dataclass(frozen=True)
class Timing:
    """Microseconds a round, over `repeats` of them."""

    median: float
    p10: float
    p90: float
    p99: float
    repeats: int


def interleave(rounds: Mapping[Key, Round], *, repeats: int, seconds: float, warmup: int = 3) -> dict[Key, Timing]:
    """Time every contender `repeats` times, or fewer (but at least three) once `seconds` have passed."""
    with alone():
        return take_turns(rounds, repeats, seconds, warmup) if rounds else {}


def take_turns(rounds: Mapping[Key, Round], repeats: int, seconds: float, warmup: int) -> dict[Key, Timing]:
    for run in rounds.values():
        for _ in range(warmup):
            block_until_ready(run())
    names = list(rounds)
    samples: dict[Key, list[float]] = {name: [] for name in names}
    until = time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a round would count as that contender's time
    try:
        for repeat in range(repeats):
            if repeat >= 3 and time.perf_counter() > until:
                break
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                block_until_ready(rounds[name]())
                samples[name].append(timed(rounds[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: summary(times) for name, times in samples.items()}


def summary(times: list[float]) -> Timing:
    p10, median, p90, p99 = (round(float(x) * 1e6, 1) for x in np.percentile(times, (10, 50, 90, 99)))
    return Timing(median, p10, p90, p99, len(times))


def issued(issue: Callable[[], Any], last: Round, rounds: int) -> Any:
    """The last of rounds none of which is waited for before the next is issued."""
    for _ in range(rounds - 1):
        issue()
    return last()


def each_round(timing: Timing, rounds: int) -> Timing:
    """Of a timing of several rounds in a row, what one of them took."""
    values = {name: round(getattr(timing, name) / rounds, 1) for name in ("median", "p10", "p90", "p99")}
    return replace(timing, **values) if rounds > 1 else timing
