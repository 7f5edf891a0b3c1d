"""n matrix products of one shape, each with operands of its own: the problems of experiments/coalesced_sgemm.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from coalesce.heavy import heavy_eqns, heavy_op, HeavyOp
from coalesce.measuring.in_program import NOISE
from coalesce.passes.pipeline import normalise
from coalesce.tracing import trace
from experiments.methods import Options, Tenants
from experiments.peers_common import Cell

SIZES = {"sgemm": (3136, 576, 64), "matvec": (1, 1024, 2048)}  # M, K, N
ARITHMETIC = {"f32": ("float32", "highest"), "tf32": ("float32", None), "bf16": ("bfloat16", None)}


def multiply(precision: str | None, params: Any, x: jax.Array) -> jax.Array:
    return jnp.dot(x, params["kernel"], precision=precision)


@cache
def function(precision: str | None) -> Any:
    """One object for all tenants, so that they share what is traced from it."""
    return partial(multiply, precision)


def op_of(apply: Callable[..., Any], params: Any, *inputs: Any) -> HeavyOp:
    """The one heavy op of a function."""
    (op,) = map(heavy_op, heavy_eqns(normalise(trace(apply, params, *inputs)).program.jaxpr))
    return op


@dataclass(frozen=True)
class Products:
    """`count` products [m, k] x [k, n]."""

    m: int
    k: int
    n: int
    arithmetic: str  # of ARITHMETIC
    count: int

    @property
    def dtype(self) -> str:
        return ARITHMETIC[self.arithmetic][0]

    @property
    def precision(self) -> str | None:
        return ARITHMETIC[self.arithmetic][1]

    @property
    def op(self) -> HeavyOp:
        left, right = (jax.ShapeDtypeStruct(shape, self.dtype) for shape in ((self.m, self.k), (self.k, self.n)))
        return op_of(function(self.precision), {"kernel": right}, left)

    def cell(self, options: list[Options]) -> Cell:
        """A tenant for each product."""

        def operand(seed: int, shape: tuple[int, ...]) -> jax.Array:
            return jnp.asarray(np.roll(np.resize(NOISE, shape), seed), self.dtype)

        params = [{"kernel": operand(i, (self.k, self.n)) / self.k**0.5} for i in range(self.count)]
        inputs = [(operand(-i, (self.m, self.k)),) for i in range(self.count)]
        tenants = Tenants(function(self.precision), params, inputs)
        model = cast(Any, None)  # only the peers of whole models ask for it
        return Cell(model, {}, self.dtype, self.m, self.precision, tenants, options, ExitStack())
