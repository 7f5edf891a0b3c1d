"""What each superkernel of coalesce.kernels does on a device, in the terms of `Machine`.

f(machine, op, groups, rows) -> us      groups problems with right operands of their own, rows lanes on each
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from coalesce.costs.arithmetic import rate
from coalesce.costs.machine import Machine
from coalesce.costs.product import Product, together_us
from coalesce.heavy import HeavyOp

REPACKED = 3  # a convolution of the library wants weights in another layout: read, written, read
SHORTEST = 0.01  # microseconds: of a measured kernel, without its launch
INTERPRETED = 1000  # times as slow, roughly
DEPTHWISE_US = 6.0  # on a GPU, beside the traffic: 7.5 to 12 us were measured of 1 to 4 problems of 0.4 to 3 MB
FUSED_TAPS = 9  # of a window whose patches are one kernel on a GPU: 3x3 is, 7x7 is not (compiled for an H100)


def nbytes(struct: Any) -> int:
    return prod(struct.shape) * struct.dtype.itemsize


def batched_dot(machine: Machine, op: HeavyOp, groups: int, rows: int) -> float:
    weights, lhs, out = groups * nbytes(op.rhs), groups * rows * nbytes(op.lhs), groups * rows * nbytes(op.out)
    if op.m * rows == 1:  # XLA multiplies and adds up, as fast as the weights come in
        return machine.stream(weights, lhs + out)
    us = machine.product(rate(op, machine.device), groups * op.batch, rows * op.m, op.n, op.k, weights, lhs + out)
    if rows > 1 and op.batch > 1:  # lanes move behind the op's own batch dimensions, and back
        us += machine.copy(lhs) + machine.copy(out)
    return us


def conv_slices(machine: Machine, op: HeavyOp, groups: int, rows: int) -> float:
    moved = groups * rows * (patch_bytes(op) + nbytes(op.out))
    size = groups * op.batch, rows * op.m, op.n, op.k
    dot = machine.product(rate(op, machine.device), *size, groups * nbytes(op.rhs), moved)
    return im2col(machine, op, groups, rows) + dot


def im2col(machine: Machine, op: HeavyOp, groups: int, rows: int) -> float:
    """A convolution's patches: made one window dimension after the other, the last first.

    XLA on a GPU makes a kernel of each, or one of all while the taps are few. On a CPU it first writes every tap apart.
    """
    out, window = op.out.shape[1:-1], op.rhs.shape[:-2]
    size = [groups * rows, *op.lhs.shape]
    itemsize = op.lhs.dtype.itemsize
    on_gpu = machine.device.platform == "gpu"
    if on_gpu and 1 < prod(window) <= FUSED_TAPS:
        return machine.stream(0, prod(size) * itemsize + patch_bytes(op) * groups * rows)
    us, written = 0.0, 1 if on_gpu else 3
    for axis in reversed(range(len(window))):
        read = prod(size)
        size[axis + 2] = out[axis]
        size[-1] *= window[axis]
        if window[axis] > 1:
            us += machine.stream(0, (read + written * prod(size)) * itemsize)
    return us


def patch_bytes(op: HeavyOp) -> int:
    return op.batch * op.m * op.k * op.lhs.dtype.itemsize


def conv_grouped(machine: Machine, op: HeavyOp, groups: int, rows: int) -> float:
    if machine.device.platform == "gpu" and op.n == 1:  # a filter a channel: as fast as its operands come in
        return DEPTHWISE_US + machine.stream(groups * nbytes(op.rhs), groups * rows * (nbytes(op.lhs) + nbytes(op.out)))
    us = library_conv(machine, op, groups, rows, machine.device.grouped_efficiency, 1)
    if groups > 1:  # channels of all problems lie side by side
        us += machine.copy(groups * rows * nbytes(op.lhs)) + machine.copy(groups * rows * nbytes(op.out))
    return us


def conv_taps(machine: Machine, op: HeavyOp, groups: int, rows: int) -> float:
    """One loop on plain cores, in float32 at least; operands are read once, as a cache has them for the other taps."""
    device, names = machine.device, (op.lhs.dtype.name, op.out.dtype.name)
    peak = device.rates.f64 if {"float64", "complex128"} & {*names} else device.rates.f32
    arithmetic = groups * rows * op.flops / (peak * 1e6 * device.taps_efficiency)
    moved = groups * rows * (nbytes(op.lhs) + nbytes(op.out))
    return machine.kernel(arithmetic, groups * nbytes(op.rhs), moved)


def separate(machine: Machine, op: HeavyOp, groups: int, rows: int) -> float:
    device = machine.device
    if op.kind == "dot":
        one = batched_dot(machine, op, 1, rows)
    else:
        grouped = op.params["feature_group_count"] * op.params["batch_group_count"] > 1
        efficiency = device.grouped_efficiency if grouped else device.conv_efficiency
        one = library_conv(machine, op, 1, rows, efficiency, REPACKED)
    if groups == 1:
        return one
    one += machine.copy(rows * nbytes(op.lhs))  # an operand out of its stack; on a GPU weights are read where they lie
    one += machine.copy(nbytes(op.rhs)) if device.platform == "cpu" else 0.0
    return groups * one + machine.copy(groups * rows * nbytes(op.out))


def library_conv(machine: Machine, op: HeavyOp, groups: int, rows: int, efficiency: float, passes: int) -> float:
    moved = groups * rows * (nbytes(op.lhs) + nbytes(op.out))
    size = groups * op.batch, rows * op.m, op.n, op.k
    weights = passes * groups * nbytes(op.rhs)
    return machine.device.conv_us + machine.product(rate(op, machine.device) * efficiency, *size, weights, moved)


def indexed_gemm(machine: Machine, op: HeavyOp, groups: int, rows: int) -> float:
    """Everything is read where it lies; on a CPU it is interpreted, which no plan should choose."""
    moved = groups * rows * (nbytes(op.lhs) + nbytes(op.out))
    size = groups * op.batch, rows * op.m, op.n, op.k
    us = machine.product(rate(op, machine.device), *size, groups * nbytes(op.rhs), moved)
    return us if machine.device.platform == "gpu" else INTERPRETED * us


def horizontal(machine: Machine, parts: Sequence[tuple[HeavyOp, int, int]], measured: Sequence[float | None]) -> float:
    """One launch for (op, groups, rows) of any shapes. What was `measured` of one alone, in a launch of its own, is
    what its tiles take in company too, whatever holds them up."""
    device, products = machine.device, list[Product]()
    for (op, groups, rows), us in zip(parts, measured, strict=True):
        product = rate(op, device), groups * op.batch, rows * op.m, op.n, op.k
        if us is not None:
            faster = together_us(device, [product]) / max(us - device.launch_us, SHORTEST)
            product = product[0] * faster, *product[1:]
        products.append(product)
    weights = sum(groups * nbytes(op.rhs) for op, groups, _ in parts)
    moved = sum(groups * rows * (nbytes(op.lhs) + nbytes(op.out)) for op, groups, rows in parts)
    us = machine.together(products, weights, moved)
    return us if machine.device.platform == "gpu" else INTERPRETED * us


BY_KERNEL: Mapping[str, Callable[[Machine, HeavyOp, int, int], float]] = {
    "batched_dot": batched_dot,
    "batched_matvec": batched_dot,
    "conv_slices": conv_slices,
    "conv_grouped": conv_grouped,
    "conv_taps": conv_taps,
    "separate": separate,
    "indexed_gemm": indexed_gemm,
    "indexed_matvec": indexed_gemm,
    "mosaic_gemm": indexed_gemm,
}
