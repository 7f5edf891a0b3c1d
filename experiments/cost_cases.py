"""What cost_error measures: superkernels over ops of coalesce.models, and the copies between packs.

G problems with right operands of their own; one lane on each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from coalesce.costs import Costs
from coalesce.heavy import heavy_eqns, heavy_op, HeavyOp
from coalesce.kernels import choose, KERNELS
from coalesce.measuring.in_program import Work
from coalesce.models import by_name
from coalesce.passes.pipeline import normalise
from coalesce.tracing import trace

MOST_FLOPS = 2e9  # of one problem; VGG-16 has layers of 3.7e9, which no device is short of work with
MOST_WEIGHTS = 64e6  # bytes of one problem's right operand


@dataclass(frozen=True)
class Case:
    """Something that the cost model predicts and a program measures."""

    cls: str  # the row of the summary that it counts in
    what: str
    dtype: str
    kernel: str
    groups: int
    predicted: float  # us
    work: Work
    chosen: bool = False  # whether the compiler takes this kernel for so many problems

    @property
    def row(self) -> dict[str, Any]:
        names = ("cls", "what", "dtype", "kernel", "groups", "chosen")
        return {name: getattr(self, name) for name in names} | {"predicted_us": round(self.predicted, 2)}


def model_ops(dtype: str, names: Sequence[str]) -> list[HeavyOp]:
    """Every distinct heavy op of the models, as `coalesce.fuse` normalises them, batch 1."""
    found = {op.key: op for name in names for op in program_ops(name, dtype)}
    return [op for op in found.values() if op.flops <= MOST_FLOPS and size(op.rhs) <= MOST_WEIGHTS]


def program_ops(name: str, dtype: str) -> list[HeavyOp]:
    model = by_name(name, dtype=dtype, param_dtype=dtype)
    params = jax.eval_shape(model.init, jax.random.key(0))
    program = normalise(trace(model.apply, params, *model.inputs(1), name=name)).program
    return [heavy_op(eqn) for eqn in heavy_eqns(program.jaxpr)]


def sample(ops: Sequence[HeavyOp], count: int) -> list[HeavyOp]:
    """`count` of the ops: the same share of each class, evenly spread over its FLOPs, classes in turns."""
    classes: dict[str, list[HeavyOp]] = {}
    for op in ops:
        classes.setdefault(cls_of(op, ""), []).append(op)
    share = min(1.0, count / len(ops))
    chosen: list[tuple[float, HeavyOp]] = []
    for members in classes.values():
        members = sorted(members, key=lambda op: (op.flops, op.shape))
        few = max(1, round(share * len(members)))
        picked = [members[(2 * i + 1) * len(members) // (2 * few)] for i in range(few)]
        # A run that ends early has seen the same share of each class, and small ops as well as large ones.
        chosen += [((i * 0.618) % 1.0, op) for i, op in enumerate(picked)]
    return [op for _, op in sorted(chosen, key=lambda item: item[0])]


def size(struct: Any) -> int:
    return prod(struct.shape) * struct.dtype.itemsize


def cls_of(op: HeavyOp, kernel: str) -> str:
    if op.kind == "dot":
        return "matvec" if op.m == 1 else "dot"
    if op.params["feature_group_count"] > 1:
        return f"grouped {kernel}".rstrip()
    return kernel or "conv"


def kernels_of(op: HeavyOp, groups: Sequence[int], platform: str) -> list[str]:
    """What `choose` picks for these numbers of problems; for a plain convolution the patches besides, since packs of
    unequal ops are made of them."""
    picked = [choose(op, g, platform) for g in groups]
    if op.kind == "conv" and op.params["feature_group_count"] == 1:
        picked.append("conv_slices")
    return list(dict.fromkeys(picked))


def op_cases(op: HeavyOp, kernel: str, groups: Sequence[int], costs: Costs) -> Iterator[Case]:
    for g in groups:
        lhs = jax.ShapeDtypeStruct((g, 1, *op.lhs.shape), op.lhs.dtype)
        rhs = jax.ShapeDtypeStruct((g, *KERNELS[kernel].layout(op).of(op.rhs.shape)), op.rhs.dtype)
        run = partial(run_kernel, KERNELS[kernel].run, op)
        predicted = costs.op(op, g, kernel=kernel)
        chosen = kernel == choose(op, g, costs.device.platform)
        work = Work(run, lhs, (rhs,))
        yield Case(cls_of(op, kernel), op.shape, str(op.lhs.dtype), kernel, g, predicted, work, chosen)


def run_kernel(kernel: Any, op: HeavyOp, x: Any, ws: Sequence[Any]) -> Any:
    return kernel(op, x, ws[0])


def movement_cases(costs: Costs) -> Iterator[Case]:
    """Members of near-equal shape, padded and stacked, and cut apart again; one more kernel, one more iteration."""
    for members, rows, columns in (
        (2, 49, 60),
        (2, 196, 250),
        (4, 196, 250),
        (2, 784, 500),
        (4, 784, 500),
        (8, 3000, 250),
    ):
        what, shape = f"{members} of [{rows},{columns}]", (members, rows, columns)
        own, *others = (float32(rows - i, columns - i) for i in range(members))
        us = costs.stack([size(own), *map(size, others)], size(float32(*shape)))
        yield Case("stack", what, "float32", "", members, us, Work(partial(stack, shape), own, tuple(others)))
        us = costs.light(size(own), size(own))
        yield Case("unstack", what, "float32", "", members, us, Work(partial(unstack, own.shape), float32(*shape)))
    for shape in ((8,), (1024, 1024)):
        us = costs.light(size(float32(*shape)), size(float32(*shape)))
        yield Case("light", str(list(shape)), "float32", "", 1, us, Work(elementwise, float32(*shape)))
    yield Case("loop", "one iteration", "float32", "", 1, costs.loop, write_only(loop=True))


def write_only(loop: bool = False) -> Work:
    return Work(None, float32(8), loop=loop)


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def stack(shape: tuple[int, ...], x: Any, ws: Sequence[Any]) -> Any:
    members = [jnp.pad(a, [(0, want - have) for want, have in zip(shape[1:], a.shape, strict=True)]) for a in (x, *ws)]
    return jnp.stack(members)


def unstack(shape: tuple[int, ...], x: Any, ws: Sequence[Any]) -> Any:
    return x[1][tuple(slice(0, n) for n in shape)]


def elementwise(x: Any, ws: Sequence[Any]) -> Any:
    return x * 2 + 1
