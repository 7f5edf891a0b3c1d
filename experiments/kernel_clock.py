"""Microseconds of kernels in the middle of a program, several compared.

On a GPU from the profiler: each contender is a program of its own, and its launches' own times count, not what a call
costs (60 to 90 us, more than most kernels take). Rounds have operands of their own, in turns, so that together they are
larger than any cache, as the weights of a network are. Elsewhere by coalesce/measuring/in_program.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coalesce.measuring.in_program import array, in_program_us, Work
from experiments import profiler
from experiments.cells import brief
from experiments.cost_cases import write_only
from experiments.methods import Options
from experiments.profiler import Launch
from experiments.results import Row

LARGER_THAN_CACHES = 256e6  # bytes
KEPT = 4e9  # bytes; most that is held of operands in turns


@dataclass(frozen=True)
class Contender:
    """Work to time, compiled with these options of XLA. `measure` is of a round's launches: `profiler.span` where some
    of them run at once. `library`: what the program must call, by the name that XLA gives it, to be what it says."""

    work: Work
    options: Options = field(default_factory=dict)
    measure: Callable[[Sequence[Launch]], float] = profiler.total
    library: str = ""


def times(contenders: Mapping[str, Contender], *, rounds: int, seconds: float) -> dict[str, Row]:
    """A row for each contender: its time, or why there is none. `seconds` bounds the timing of one without profiler."""
    if jax.default_backend() == "gpu":
        return by_profiler(contenders, rounds)
    return by_clock(contenders, rounds, seconds)


def by_profiler(contenders: Mapping[str, Contender], rounds: int) -> dict[str, Row]:
    executables = compiled(contenders)
    sets: dict[tuple[Any, ...], list[tuple[jax.Array, ...]]] = {}
    runs: dict[str, Callable[[int], Any]] = {}
    rows: dict[str, Row] = {}
    for name, executable in executables.items():
        if isinstance(executable, str):
            rows[name] = {"failed": executable}
            continue
        structs = structs_of(contenders[name].work)
        if structs not in sets:
            sets[structs] = operands(structs, rounds)
        runs[name] = partial(run_on, executable, sets[structs])
        try:
            jax.block_until_ready(runs[name](0))
        except jax.errors.JaxRuntimeError as e:  # out of memory, say
            rows[name] = {"failed": brief(e)}
            del runs[name]
    traces = profiler.rounds_of(list(runs.values()), rounds) if runs else []
    for name, trace in zip(runs, traces, strict=True):
        if not trace:
            rows[name] = {"failed": "the profiler saw no equal rounds of launches"}
            continue
        p10, median, p90 = np.percentile([contenders[name].measure(launches) for launches in trace], (10, 50, 90))
        rows[name] = {
            "round_us_median": round(float(median), 2),
            "round_us_p10": round(float(p10), 2),
            "round_us_p90": round(float(p90), 2),
            "repeats": rounds,
            "failed": "",
            "launches": len(trace[0]),
            "launches_us": round(float(np.median([profiler.total(launches) for launches in trace])), 2),
            "kernels": sorted({launch.name for launch in trace[0]})[:4],
        }
    return {name: rows[name] for name in contenders}


def compiled(contenders: Mapping[str, Contender]) -> dict[str, Any]:
    """An executable for each contender, or the reason why it has none; compiled side by side."""

    def attempt(contender: Contender) -> Any:
        work = contender.work
        try:
            lowered = jax.jit(lambda x, *ws: work.run(x, ws) if work.run else x).lower(work.x, *work.ws)
            executable = lowered.compile(contender.options)
        except Exception as e:  # of a kernel language, say, which raises its own
            return brief(e)
        if contender.library and contender.library not in (executable.as_text() or ""):
            return f"XLA does not call {contender.library} for it"
        return executable

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(contenders, pool.map(attempt, contenders.values()), strict=True))


def structs_of(work: Work) -> tuple[Any, ...]:
    return tuple((struct.shape, str(struct.dtype)) for struct in (work.x, *work.ws))


def operands(structs: Sequence[tuple[tuple[int, ...], str]], rounds: int) -> list[tuple[jax.Array, ...]]:
    """As many sets of arrays as leave each round's cold, and no more than there are rounds."""
    first = tuple(array(jax.ShapeDtypeStruct(shape, dtype)) for shape, dtype in structs)
    size = sum(prod(x.shape) * x.dtype.itemsize for x in first)
    count = max(1, min(rounds, 1 + int(LARGER_THAN_CACHES // size), int(KEPT // size)))
    return [first, *(tuple(jnp.array(x, copy=True) for x in first) for _ in range(count - 1))]


def run_on(executable: Any, sets: Sequence[tuple[jax.Array, ...]], i: int) -> Any:
    return executable(*sets[i % len(sets)])


def by_clock(contenders: Mapping[str, Contender], rounds: int, seconds: float) -> dict[str, Row]:
    """Less the write that ties runs together; options and `measure` are a GPU's."""
    write = min(in_program_us(write_only(), 64, repeats=20, seconds=seconds) for _ in range(3))

    def row(contender: Contender) -> Row:
        try:
            us = in_program_us(contender.work, min(rounds, 16), repeats=20, seconds=seconds) - write
        except Exception as e:
            return {"failed": brief(e)}
        return {"round_us_median": round(us, 2), "failed": ""} if us > 0 else {"failed": "too fast for the clock"}

    return {name: row(contender) for name, contender in contenders.items()}
