"""Max and min pools as the largest, or least, of what each tap of a window reads.

That is elementwise work like any other: XLA makes one loop of it with what follows, whose loads take several channels
at once. Its own loop over windows takes one element at a time, and asks of each whether it lies in the padding: on a
CPU it is 3 to 14 times slower (3x3 in steps of 2, 32x32x64 to 112x112x64, 1 to 8 lanes).

A tap that would read padding reads the nearest element of the window instead, which the window has anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from coalesce import jaxpr as J
from coalesce.kernels.conv_taps import take

FOLDS = {"reduce_window_max": jnp.maximum, "reduce_window_min": jnp.minimum}
MOST_TAPS = 32  # each is a load in the code of one loop


def supports(eqn: J.Eqn) -> bool:
    """Pools of few taps, each of whose windows covers an element at least."""
    if eqn.primitive.name not in FOLDS:
        return False
    p, shape = eqn.params, J.shape(eqn.invars[0])
    if set(p["base_dilation"]) != {1} or set(p["window_dilation"]) != {1} or prod(p["window_dimensions"]) > MOST_TAPS:
        return False
    return 0 not in (*shape, *J.shape(eqn.outvars[0])) and all(covers(eqn, d) for d in range(len(shape)))


def run(eqn: J.Eqn, x: Any) -> Any:
    windows, strides = eqn.params["window_dimensions"], eqn.params["window_strides"]
    if any(size > stride for size, stride in zip(windows, strides, strict=True)):
        x = lax.optimization_barrier(x)  # what several windows read is not made anew for each
    with J.context_of(eqn):
        for d, size in enumerate(windows):
            last = J.shape(eqn.invars[0])[d] - 1
            parts = (take(x, np.clip(first(eqn, d) + tap, 0, last), d) for tap in range(size))
            x = reduce(FOLDS[eqn.primitive.name], parts)
    return x


def as_written(eqn: J.Eqn) -> Callable[[Any], Any]:
    """`run`, with the derivative of JAX's own, which is that of the first of equal elements alone."""
    taps = jax.custom_jvp(partial(run, eqn))
    taps.defjvp(lambda primals, tangents: jax.jvp(lambda x: J.bind(eqn, [x])[0], primals, tangents))
    return taps


def first(eqn: J.Eqn, d: int) -> np.ndarray:
    """Where each window begins along a dimension."""
    p = eqn.params
    return np.arange(J.shape(eqn.outvars[0])[d]) * p["window_strides"][d] - p["padding"][d][0]


def covers(eqn: J.Eqn, d: int) -> bool:
    begin, size = first(eqn, d), J.shape(eqn.invars[0])[d]
    return bool(((begin < size) & (begin + eqn.params["window_dimensions"][d] > 0)).all())
