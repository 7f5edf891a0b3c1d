"""Microseconds of the candidates for one case.

On a GPU: what its kernels take, by the profiler. Runs take turns among several banks of right operands, which together
are more than a cache holds, so that weights come from memory as they do in a network. All else that they read has been
written just before, as there: on an H100 five of nine tiles that won on operands from memory lost in the network.
Elsewhere: see in_program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from coalesce.kernels import FUSING
from coalesce.measuring.case import Case
from coalesce.measuring.in_program import array, in_program_us, Work
from coalesce.measuring.profile import kernels_us
from coalesce.tuning import candidate_name, Entry, named
from coalesce.tuning.candidates import Candidate

CACHE_BYTES = 128 * 1024**2  # of an H100 50 MB
MOST_BANKS = 64

Times = dict[str, float | None]  # by candidate; None: it did not compile or run


def measure(case: Case, tried: Sequence[Candidate], lock: AbstractContextManager[Any] | None = None) -> Times:
    """Candidates may be compiled while others use the device; `lock` is held where the device is needed."""
    lock = lock or nullcontext()
    if not on_a_gpu():
        with lock:
            return {candidate_name(*one): in_program(case, *one) for one in tried}
    compiled = {one: program for one in tried if one[0] in FUSING and (program := compiled_or_none(case, *one))}
    with lock:  # XLA times variants of its own kernels as it compiles them
        for one in tried:
            if one[0] not in FUSING and (program := compiled_or_none(case, *one)):
                compiled[one] = program
        us = {candidate_name(*one): us for one, us in zip(compiled, on_gpu(case, compiled), strict=True)}
    return {name: us.get(name) for name in (candidate_name(*one) for one in tried)}


def on_a_gpu() -> bool:
    return jax.default_backend() == "gpu"


def entry_of(case: Case, times: Times) -> Entry | None:
    """What goes into the database; None if nothing ran."""
    ran = {name: round(us, 3) for name, us in times.items() if us is not None}
    if not ran:
        return None
    best = min(ran, key=lambda name: ran[name])
    kernel, blocks = named(best)
    tried = {name: ran.get(name) for name in times}
    return Entry(kernel, ran[best], blocks, tried, epilogue=case.steps, jax=jax.__version__)


def compiled_or_none(case: Case, *candidate: Any) -> Any:
    structs = case.lhs, case.rhs(candidate[0]), *case.reads
    try:
        return jax.jit(case.run(*candidate)).lower(*structs).compile()
    except Exception:  # a kernel language raises what it likes: more shared memory than there is, say
        return None


def on_gpu(case: Case, compiled: Mapping[Candidate, Any]) -> list[float]:
    given = [*map(array, case.reads), array(case.lhs)]
    written = jax.jit(lambda given: [jnp.copy(x) for x in given])
    layouts = {case.rhs(kernel) for kernel, _ in compiled}
    banks = {struct: [array(struct) for _ in range(bank_count(struct))] for struct in layouts}

    def program(candidate: Candidate, call: Callable[..., Any], turn: int, operands: Sequence[Any]) -> Any:
        weights = banks[case.rhs(candidate[0])]
        *reads, x = operands
        return call(x, weights[turn % len(weights)], *reads)

    programs = [partial(program, candidate, call) for candidate, call in compiled.items()]
    return kernels_us(programs, lambda: written(given))


def bank_count(struct: jax.ShapeDtypeStruct) -> int:
    nbytes = prod(struct.shape) * struct.dtype.itemsize
    return max(3, min(MOST_BANKS, -(-CACHE_BYTES // nbytes)))


def in_program(case: Case, *candidate: Any) -> float | None:
    run = case.run(*candidate)
    work = Work(lambda x, ws: run(x, *ws), case.lhs, (case.rhs(candidate[0]), *case.reads))
    try:
        return max(0.0, in_program_us(work, 4, repeats=20, seconds=1.0))
    except jax.errors.JaxRuntimeError:
        return None
