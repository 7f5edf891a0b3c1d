"""Small tenants of one hand-written function, and `check`, which fuses them and compares each with its own run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import coalesce
from tests.compare import assert_same

D = 4
dot = partial(jnp.dot, precision="highest")


def floats(seed: int, *shape: int) -> Any:
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 2)


def weights(n: int) -> list[dict[str, Any]]:
    return [{"w": floats(2 * i, D, D), "u": floats(2 * i + 1, D, D)} for i in range(n)]


def check(
    fn: Callable[..., Any], params: Sequence[Any], inputs: Sequence[tuple[Any, ...]], **options: Any
) -> coalesce.Fused:
    """Fuse, run and compare with each tenant alone."""
    programs = [coalesce.trace(fn, p, *x, name=f"t{i}") for i, (p, x) in enumerate(zip(params, inputs, strict=True))]
    fused = coalesce.fuse(programs, **options)
    for got, p, x in zip(fused(inputs), params, inputs, strict=True):
        assert_same(got, jax.jit(fn)(p, *x))
    return fused


def counts(fused: coalesce.Fused) -> tuple[int, int, int]:
    """(heavy ops, superkernels, alone)."""
    return fused.report.heavy_ops, fused.report.superkernels, fused.report.alone


def sequences(n: int) -> list[tuple[Any, ...]]:
    return [(floats(100 + i, 5, D),) for i in range(n)]


def vectors(n: int) -> list[tuple[Any, ...]]:
    return [(floats(100 + i, D),) for i in range(n)]
