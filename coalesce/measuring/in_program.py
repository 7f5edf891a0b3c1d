"""Microseconds of one operation in the middle of a program, where dispatch does not hide it.

A program runs the operation several times, each time with right operands of its own, as the layers of a network do:
then no work on a weight is shared between them, and no cache holds all weights. Each run reads one element of the
result before it and writes it into its left operand, so that they follow one another; barriers keep XLA from computing
that element alone and from fusing the write into the operation. Subtracted is the same program with a single run, timed
in turns with it, so that dispatch, arguments and the first touch of the program's memory cancel; and the write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from coalesce.waiting import block_until_ready

NOISE = np.random.default_rng(0).standard_normal(1 << 16)  # a GPU runs at a higher clock on zeros


@dataclass(frozen=True)
class Work:
    """`run(x, ws)` on arrays of these shapes. Without `run` nothing but the write is measured, and with `loop` the
    runs are iterations of a loop."""

    run: Callable[[Any, Sequence[Any]], Any] | None
    x: jax.ShapeDtypeStruct
    ws: tuple[jax.ShapeDtypeStruct, ...] = ()
    loop: bool = False

    @property
    def weight_bytes(self) -> int:
        return sum(prod(w.shape) * w.dtype.itemsize for w in self.ws)


def chain(work: Work, runs: int, index: Any, seed: Any, x: Any, *weights: Any) -> Any:
    """`runs` runs in sequence, run i on the i-th part of `weights`."""

    def once(x: Any, ws: Sequence[Any]) -> Any:
        y = work.run(x, ws) if work.run else seed
        y, x = lax.optimization_barrier((y, x))
        element = lax.dynamic_index_in_dim(jax.tree.leaves(y)[0].reshape(-1), index, keepdims=False)
        return lax.optimization_barrier(x.at[(0,) * x.ndim].set((element * 0).astype(x.dtype)))

    if work.loop:
        return lax.fori_loop(0, runs, lambda _, x: once(x, weights), x).reshape(-1)[0]
    for i in range(runs):
        x = once(x, weights[i * len(work.ws) : (i + 1) * len(work.ws)])
    return x.reshape(-1)[0]


def array(struct: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(np.resize(NOISE.astype(struct.dtype), struct.shape))


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call, until its results are there."""
    start = time.perf_counter()
    block_until_ready(run())
    return time.perf_counter() - start


def in_program_us(work: Work, runs: int, *, repeats: int, seconds: float) -> float:
    """Microseconds of one run and its write: of the fastest rounds, since whoever else uses the machine only adds."""
    weights = [array(w) for _ in range(1 if work.loop else 1 + runs) for w in work.ws]
    arguments = (np.int32(0), jnp.zeros(1, work.x.dtype), array(work.x), *weights)
    programs = [jax.jit(partial(chain, work, count), keep_unused=True).lower(*arguments) for count in (1, 1 + runs)]
    rounds = [partial(program.compile(), *arguments) for program in programs]
    for _ in range(3):
        jax.block_until_ready([run() for run in rounds])
    fastest, until = [float("inf")] * 2, time.perf_counter() + seconds
    for repeat in range(repeats):
        if repeat >= 3 and time.perf_counter() > until:
            break
        fastest = [min(best, timed(run)) for best, run in zip(fastest, rounds, strict=True)]
    return (fastest[1] - fastest[0]) / runs * 1e6
