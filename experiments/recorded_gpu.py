"""Times that other programs than cost_error measured on GPUs, for the cost model to be held against on any machine.

H100: 80 GB HBM3, JAX 0.11.2, driver 580; H200: experiments/results/h200. One round of n problems with weights and
inputs of their own, in microseconds; `call_us` of them is dispatch, not work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from coalesce.costs import Costs, DEVICES
from coalesce.heavy import heavy_op, HeavyOp
from experiments.cost_cases import program_ops, size


@dataclass(frozen=True)
class Record:
    cls: str
    what: str
    dtype: str
    groups: int
    us: float
    call_us: float
    predict: Callable[[Costs], float]
    device: str = "H100"

    @property
    def row(self) -> dict[str, Any]:
        row = {name: getattr(self, name) for name in ("cls", "what", "dtype", "groups", "device")}
        predicted = self.predict(Costs(DEVICES[self.device]))
        return row | {"measured_us": round(self.us - self.call_us, 1), "predicted_us": round(predicted, 1)}


CALLED = 75.0  # one call and waiting for it: 60 to 90
DISPATCHED = 42.0  # one call of many, with few arguments
MANY_ARGUMENTS = 420.0  # the same, with 400 of them

# M=3136 K=576 N=64: (precision, problems, whether they are one pack, us).
SGEMM = (
    ("highest", 16, False, 456), ("highest", 32, False, 915),
    ("highest", 16, True, 244), ("highest", 32, True, 395), ("highest", 64, True, 637),
    (None, 64, True, 320),
)  # fmt: skip

# 3x3 convolutions, 16 problems, bfloat16: (size, channels in and out, us by kernel).
CONVS = (
    (7, 512, {"separate": 485, "conv_grouped": 434, "conv_slices": 80}),
    (14, 256, {"separate": 436, "conv_grouped": 119, "conv_slices": 64}),
    (28, 128, {"separate": 301, "conv_grouped": 57, "conv_slices": 55}),
    (56, 64, {"separate": 394, "conv_grouped": 85, "conv_slices": 78}),
)

# Products of several shapes (M, K, N), one kernel each, bfloat16; repeated in a loop of which the empty loop was
# subtracted, so that small operands stay in the L2: (problems of each shape, us).
SHAPES = {
    "BERT-base and ResNet-50": ((128, 768, 768), (128, 768, 3072), (784, 512, 128), (196, 1024, 256)),
    "eight small": (
        (49, 2048, 512), (49, 512, 2048), (196, 256, 1024), (196, 1024, 256),
        (128, 768, 768), (64, 1024, 1024), (197, 192, 576), (197, 768, 192),
    ),
    "3x3 of ResNet-18": ((3136, 576, 64), (784, 1152, 128), (196, 2304, 256), (49, 4608, 512)),
}  # fmt: skip
MANY_SHAPES = (
    ("BERT-base and ResNet-50", 1, 8.9), ("BERT-base and ResNet-50", 4, 25.6),
    ("eight small", 1, 22.3), ("eight small", 4, 50.5), ("3x3 of ResNet-18", 1, 18.6),
)  # fmt: skip

# ResNet-50, 16 tenants: time in kernels, by the profiler.
IN_KERNELS = (("float32", 2970), ("bfloat16", 1731))
# What one tenant more costs: (device, dtype, from, to, us of a round with the one and with the other).
ONE_MORE = (
    ("H100", "float32", 16, 32, 3403, 6019), ("H100", "bfloat16", 16, 32, 2120, 3411),
    ("H200", "float32", 16, 64, 3618, 9556), ("H200", "bfloat16", 16, 64, 2424, 6420),
)  # fmt: skip


def records() -> Iterator[Record]:
    for precision, n, pack, us in SGEMM:
        op = dot_op((3136, 576, 64), "float32", precision)
        what = f"{op.shape} {precision or 'default'}, {'one pack' if pack else 'one by one'}"
        yield Record("dot", what, "float32", n, us, CALLED, partial(ops_us, [op], n, pack, None))
    for pixels, channels, by_kernel in CONVS:
        op = conv_op(pixels, channels, "bfloat16")
        for kernel, us in by_kernel.items():
            yield Record(kernel, op.shape, "bfloat16", 16, us, DISPATCHED, partial(ops_us, [op], 16, True, kernel))
    for name, n, us in MANY_SHAPES:
        ops = [dot_op(shape, "bfloat16") for shape in SHAPES[name]]
        yield Record("dot", f"{name}, each shape a kernel", "bfloat16", n, us, 0.0, partial(ops_us, ops, n, True, None))
    # 16 tenants of a 12-layer MLP, 512 wide, batch 16; weights stacked ahead, or one program without packs.
    layers = [dot_op((16, 512, 512), "float32")] * 12
    yield Record("network", "MLP, one pack a layer", "float32", 16, 167, CALLED, partial(network_us, layers, 16))
    alone = partial(network_us, layers * 16, 1)
    yield Record("network", "MLP, one by one", "float32", 16, 1270, MANY_ARGUMENTS, alone)
    ops = {dtype: program_ops("resnet50", dtype) for dtype, _ in IN_KERNELS}
    for dtype, us in IN_KERNELS:
        yield Record("network", "ResNet-50, in kernels", dtype, 16, us, 0.0, partial(network_us, ops[dtype], 16))
    for device, dtype, few, many, base, us in ONE_MORE:
        predict = partial(one_more_us, ops[dtype], few, many)
        each = (us - base) / (many - few)
        yield Record(
            "network", f"ResNet-50, one tenant more than {few}, {device}", dtype, 1, each, 0.0, predict, device
        )


def ops_us(ops: Sequence[HeavyOp], n: int, pack: bool, kernel: str | None, costs: Costs) -> float:
    return sum(costs.op(op, n, kernel=kernel) if pack else n * costs.op(op, 1, kernel=kernel) for op in ops)


def network_us(ops: Sequence[HeavyOp], n: int, costs: Costs) -> float:
    """Heavy ops, and an elementwise tail for each that reads two values of the result's size and writes one."""
    return sum(costs.op(op, n) + costs.light(2 * n * size(op.out), n * size(op.out)) for op in ops)


def one_more_us(ops: Sequence[HeavyOp], few: int, many: int, costs: Costs) -> float:
    return (network_us(ops, many, costs) - network_us(ops, few, costs)) / (many - few)


def dot_op(shape: tuple[int, int, int], dtype: str, precision: str | None = None) -> HeavyOp:
    m, k, n = shape
    structs = jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((k, n), dtype)
    return only_op(lambda x, w: jnp.dot(x, w, precision=precision), *structs)


def conv_op(pixels: int, channels: int, dtype: str) -> HeavyOp:
    """3x3, as many channels out as in."""
    image = jax.ShapeDtypeStruct((1, pixels, pixels, channels), dtype)
    weight = jax.ShapeDtypeStruct((3, 3, channels, channels), dtype)
    convolve = partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
    return only_op(partial(convolve, dimension_numbers=("NHWC", "HWIO", "NHWC")), image, weight)


def only_op(fn: Callable[..., Any], *structs: Any) -> HeavyOp:
    (eqn,) = jax.make_jaxpr(fn)(*structs).jaxpr.eqns
    return heavy_op(eqn)
