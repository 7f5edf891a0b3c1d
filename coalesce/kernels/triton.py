"""Pallas' Triton backend, as far as the kernels use it: the one place that knows its versions.

A kernel is compiled for a GPU and interpreted anywhere else, whichever the program is lowered for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from coalesce.kernels.platforms import by_platform
from coalesce.kernels.underived import underived


def launch(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    outs: Sequence[jax.ShapeDtypeStruct],
    args: Sequence[Any],
    *,
    name: str,
    warps: int,
    stages: int,
) -> Sequence[Any]:
    """One launch of `kernel(*args, *outs)`, whose arguments are references to whole arrays in memory.

    Profilers show it by its name.
    """
    from jax.experimental.pallas import triton  # here: a process that never meets a GPU kernel does not pay for it

    def call(interpret: bool) -> Callable[..., Sequence[Any]]:
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=list(outs),
            name=name,
            interpret=interpret,
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        )

    run = partial(by_platform, cuda=call(False), rocm=call(False), default=call(True))
    return underived(run, name)(*args)


def load(ref: Any, index: tuple[Any, ...], mask: Any = None) -> Any:
    """The elements of `ref` at `index`, zero where `mask` is not set; without a mask all of them are there."""
    from jax.experimental.pallas import triton

    other = None if mask is None else jnp.zeros((), ref.dtype)
    return triton.load(ref.at[index], mask=spread(mask, index), other=other)


def store(ref: Any, index: tuple[Any, ...], value: Any, mask: Any = None) -> None:
    from jax.experimental.pallas import triton

    triton.store(ref.at[index], value, mask=spread(mask, index))


def spread(mask: Any, index: tuple[Any, ...]) -> Any:
    """A mask for every element at `index`."""
    return None if mask is None else jnp.broadcast_to(mask, jnp.broadcast_shapes(*map(jnp.shape, index)))


def dot(a: Any, b: Any, precision: Any, by_columns: bool = False) -> Any:
    """[m,k] x [k,n], or x [n,k], accumulated in float32."""
    return lax.dot_general(a, b, (((1,), (1 if by_columns else 0,)), ((), ())), precision, jnp.float32)


def both(*masks: Any) -> Any:
    """Where all of the masks are set. None is a mask that is set everywhere, and costs nothing."""
    given = [mask for mask in masks if mask is not None]
    return reduce(lambda a, b: a & b, given) if given else None


# Triton's integers divide by `lax.div` and `lax.rem`, and by operands of one dtype.


def div(a: Any, b: int) -> Any:
    return a if b == 1 else lax.div(a, jnp.full_like(a, b))


def rem(a: Any, b: int) -> Any:
    return jnp.zeros_like(a) if b == 1 else lax.rem(a, jnp.full_like(a, b))
