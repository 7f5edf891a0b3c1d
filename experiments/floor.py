"""The device floor: what a round would take if every byte that a heavy op reads or writes travelled once, at the
measured bandwidth, or its FLOPs ran at the measured rate of a large product, whichever takes longer. All else is free.

A round can only be faster where a cache hands one heavy op's result to the next. Which heavy ops a tenant has is read
from Coalesce's own plan of one tenant. A loop's right operands count once, since a device might keep its weights; what
else its body reads and writes counts each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

import coalesce
from coalesce import jaxpr as J
from coalesce.bundle import bodies, JointLoop, Loop, Pack, Schedule, Step
from coalesce.heavy import HeavyOp
from coalesce.models import Model
from experiments.alone import alone
from experiments.results import Row


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: copying, as read plus write, and a large matrix product."""

    gbs: float
    tflops: float


def measure_ceilings(dtype: str) -> Ceilings:
    """Calls are dispatched in a row and waited for once; the fastest of several such rows counts."""
    size, elements = (8192, 1 << 28) if jax.default_backend() == "gpu" else (1024, 1 << 24)
    left, right = (jax.random.normal(jax.random.key(i), (size, size), jnp.float32).astype(dtype) for i in range(2))
    dot = jax.jit(jnp.dot).lower(left, right).compile()
    product_s = seconds_a_call(lambda _: dot(left, right), left)
    long = jnp.arange(elements, dtype=jnp.float32)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0).lower(long).compile()  # into the same memory: none is new
    copy_s = seconds_a_call(copy, long)
    return Ceilings(round(2 * long.dtype.itemsize * elements / copy_s / 1e9, 1), round(2e-12 * size**3 / product_s, 3))


def seconds_a_call(call: Callable[[Any], Any], state: Any, calls: int = 10, rows: int = 5) -> float:
    """`call` gets what the call before it returned."""
    state, best = jax.block_until_ready(call(state)), float("inf")
    with alone():
        for _ in range(rows):
            start = time.perf_counter()
            for _ in range(calls):
                state = call(state)
            jax.block_until_ready(state)
            best = min(best, (time.perf_counter() - start) / calls)
    return best


@dataclass(frozen=True)
class Work:
    """A heavy op, run `times` times by each tenant in a round."""

    op: HeavyOp
    times: int = 1

    @property
    def flops(self) -> int:
        return self.op.flops * self.times

    @property
    def nbytes(self) -> int:
        return nbytes(self.op.rhs) + self.times * (nbytes(self.op.lhs) + nbytes(self.op.out))

    def us(self, ceilings: Ceilings) -> float:
        return max(self.nbytes / ceilings.gbs / 1e3, self.flops / ceilings.tflops / 1e6)


def heavy_work(model: Model, batch: int) -> list[Work]:
    """The heavy ops of one tenant's round."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    program = coalesce.trace(model.apply, params, *model.inputs(batch), name=model.name)
    return list(work_in(coalesce.fuse([program], policy="never").bundle.schedule, 1))


def work_in(schedule: Schedule, times: int) -> Iterator[Work]:
    for item in schedule:
        match item:
            case Pack():
                yield from (Work(member.op, times) for member in item.members)
            case Step():
                yield from (Work(member.op, times) for member in item.alone)
            case Loop() | JointLoop():
                for body in bodies(item):
                    yield from work_in(body, times * trips(item))


def trips(loop: Loop | JointLoop) -> int:
    """How often a loop's body runs: at least once, where only a run can tell."""
    if isinstance(loop, JointLoop):
        return loop.length
    return J.as_scan(loop.eqn).length if loop.eqn.primitive.name == "scan" else 1


def nbytes(struct: Any) -> int:
    return prod(struct.shape) * struct.dtype.itemsize


def floor_row(model: Model, tenants: int, batch: int, ceilings: Ceilings) -> Row:
    """Of a round of so many tenants, each with weights and a request of its own."""
    work = heavy_work(model, batch)
    us = round(tenants * sum(one.us(ceilings) for one in work), 4)
    names = ("round_us_median", "round_us_p10", "round_us_p90", "latency_p99_us", "sustained_us_median")
    times = dict.fromkeys(names, us)
    total = {"bytes": sum(one.nbytes for one in work), "flops": sum(one.flops for one in work)}
    facts = {"gbs": ceilings.gbs, "tflops": ceilings.tflops, "heavy_ops": len(work), **total}
    how = f"{ceilings.gbs:,.0f} GB/s, {ceilings.tflops:,.1f} TFLOP/s"
    return {"method": "floor", "kind": "floor", **times, "error": 0.0, "failed": "", "how": how, "facts": facts}
