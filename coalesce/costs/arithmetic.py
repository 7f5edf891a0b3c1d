"""Which of a device's units a heavy op runs on: read from its dtypes, precision and accumulation type.

XLA on a GPU takes float32 products at the default (and at the high) precision through TensorFloat-32 where the device
has it, and through several products where an algorithm such as BF16_BF16_F32_X3 says so.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from coalesce.costs.devices import Device
from coalesce.heavy import HeavyOp

BY_DTYPE = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "int8", "uint8": "int8"}
COMPLEX = {"complex64": "f32", "complex128": "f64"}  # four real products each


def rate(op: HeavyOp, device: Device) -> float:
    """FLOPs a microsecond of a large product with the arithmetic of `op`, on all cores."""
    unit, products = arithmetic(op)
    tflops = getattr(device.rates, unit) or device.rates.f32
    return tflops * 1e6 / products


def arithmetic(op: HeavyOp) -> tuple[str, int]:
    """(a field of `Rates`, how many products of it make one product of the op)."""
    names = [np.dtype(side.dtype).name for side in (op.lhs, op.rhs)]
    if preferred := op.params["preferred_element_type"]:
        names += [np.dtype(preferred).name] if np.dtype(preferred).name in ("float64", "complex128") else []
    widest = max(names, key=lambda name: np.dtype(name).itemsize)
    if widest in COMPLEX:
        return COMPLEX[widest], 4
    unit = BY_DTYPE.get(widest, "f32")  # integers wider than a byte run on plain cores
    if unit != "f32" or widest != "float32":
        return unit, 1
    return named(op.precision)


def named(precision: Any) -> tuple[str, int]:
    """The arithmetic of a float32 product: None, a `Precision`, a pair of them, an algorithm or the preset of one."""
    if hasattr(precision, "lhs_precision_type"):  # an algorithm, which is a tuple too
        return BY_DTYPE.get(np.dtype(precision.lhs_precision_type).name, "tf32"), precision.num_primitive_operations
    if isinstance(precision, tuple):
        precision = "HIGHEST" if "HIGHEST" in {getattr(p, "name", p) for p in precision} else None
    name = str(getattr(precision, "name", precision)).upper()
    if name in ("HIGHEST", "F32_F32_F32"):
        return "f32", 1
    found = re.search(r"_X(\d+)$", name)
    unit = next((unit for unit in ("bf16", "f16", "f64") if name.startswith(unit.upper())), "tf32")
    return unit, int(found.group(1)) if found else 1
