"""Microseconds of the candidates for one case.

On a GPU: what its kernels take, by the profiler. Runs take turns among several banks of right operands, which together
are more than a cache holds, so that weights come from memory as they do in a network. All else that they read has been
written just before, as there: on an H100 five of nine tiles that won on operands from memory lost in the network.
Beside another: two packs alike that do not depend on one another, branches of one CUDA graph, from the first start to
the last end, halved. Elsewhere: see in_program; nothing runs beside another there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from coalesce.blocks import Blocks
from coalesce.kernels import FUSING
from coalesce.measuring.case import Case
from coalesce.measuring.chain_case import ChainCase
from coalesce.measuring.in_program import array, in_program_us, Work
from coalesce.measuring.profile import kernels_us, span, total
from coalesce.tuning import candidate_name, Entry, named
from coalesce.tuning.candidates import Candidate

CACHE_BYTES = 128 * 1024**2  # of an H100 50 MB
MOST_BANKS = 64
FEW = 6  # candidates that are measured beside another
# Independent kernels of a graph are branches of it, XLA's own too.
AT_ONCE: dict[str, Any] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONVOLUTION",
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}

Times = dict[str, float | None]  # by candidate; None: it did not compile or run


def measure(
    case: Case | ChainCase,
    tried: Sequence[Candidate],
    lock: AbstractContextManager[Any] | None = None,
    beside: bool = False,
) -> Times:
    """Candidates may be compiled while others use the device; `lock` is held where the device is needed.

    `beside`: each runs beside another launch of itself, which a GPU alone can.
    """
    lock = lock or nullcontext()
    if not on_a_gpu():
        with lock:
            return {candidate_name(*one): in_program(case, *one) for one in tried}
    count = 2 if beside else 1
    compiled = {one: program for one in tried if one[0] in FUSING and (program := compiled_or_none(case, *one, count))}
    with lock:  # XLA times variants of its own kernels as it compiles them
        for one in tried:
            if one[0] not in FUSING and (program := compiled_or_none(case, *one, count)):
                compiled[one] = program
        us = {candidate_name(*one): us for one, us in zip(compiled, on_gpu(case, compiled, count), strict=True)}
    return {name: us.get(name) for name in (candidate_name(*one) for one in tried)}


def worth_trying(times: Times) -> list[Candidate]:
    """Of candidates whose times alone are known, those that may be the best beside another: the fastest few, and the
    fastest of each kernel."""
    ran = sorted((us, name) for name, us in times.items() if us is not None)
    by_kernel = {named(name)[0]: name for _, name in reversed(ran)}
    return [named(name) for name in dict.fromkeys([*(name for _, name in ran[:FEW]), *by_kernel.values()])]


def on_a_gpu() -> bool:
    return jax.default_backend() == "gpu"


def entry_of(case: Case | ChainCase, times: Times) -> Entry | None:
    """What goes into the database; None if nothing ran."""
    tried = rounded(times)
    ran = {name: us for name, us in tried.items() if us is not None}
    if not ran:
        return None
    best = min(ran, key=lambda name: ran[name])
    kernel, blocks = named(best)
    return Entry(kernel, ran[best], blocks, tried, epilogue=case.steps, jax=jax.__version__)


def rounded(times: Times) -> Times:
    return {name: None if us is None else round(us, 3) for name, us in times.items()}


def compiled_or_none(case: Case | ChainCase, kernel: str, blocks: Blocks | None, count: int = 1) -> Any:
    """A program of `count` packs alike, each with operands of its own, which may run at once."""
    structs, run = (case.lhs, case.rhs(kernel), *case.reads), case.run(kernel, blocks)

    def each(packs: Sequence[Sequence[Any]]) -> list[Any]:
        return [run(*operands) for operands in packs]

    try:
        return jax.jit(each).lower([structs] * count).compile(AT_ONCE if count > 1 else None)
    except Exception:  # a kernel language raises what it likes: more shared memory than there is, say
        return None


def on_gpu(case: Case | ChainCase, compiled: Mapping[Candidate, Any], count: int = 1) -> list[float]:
    given = [[array(case.lhs), *map(array, case.reads)] for _ in range(count)]
    written = jax.jit(lambda given: jax.tree.map(jnp.copy, given))
    layouts = {case.rhs(kernel) for kernel, _ in compiled}
    banks = {struct: [array(struct) for _ in range(bank_count(struct))] for struct in layouts}

    def program(candidate: Candidate, call: Callable[..., Any], turn: int, operands: Sequence[Sequence[Any]]) -> Any:
        weights = banks[case.rhs(candidate[0])]
        turns = range(turn * count, turn * count + count)
        return call([(x, weights[i % len(weights)], *reads) for i, (x, *reads) in zip(turns, operands, strict=True)])

    programs = [partial(program, candidate, call) for candidate, call in compiled.items()]
    times = kernels_us(programs, lambda: written(given), measure=span if count > 1 else total)
    return [us / count for us in times]


def bank_count(struct: jax.ShapeDtypeStruct) -> int:
    nbytes = prod(struct.shape) * struct.dtype.itemsize
    return max(3, min(MOST_BANKS, -(-CACHE_BYTES // nbytes)))


def in_program(case: Case | ChainCase, *candidate: Any) -> float | None:
    run = case.run(*candidate)
    work = Work(lambda x, ws: run(x, *ws), case.lhs, (case.rhs(candidate[0]), *case.reads))
    try:
        return max(0.0, in_program_us(work, 4, repeats=20, seconds=1.0))
    except jax.errors.JaxRuntimeError:
        return None
