"""Each lane's own results, out of those of all lanes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from coalesce import jaxpr as J
from coalesce.lanes import Shared, Stacked

# Results up to this size are handed out by one small kernel on a CPU; larger ones deserve several threads.
SMALL_RESULTS = 1 << 20


def by_lane(results: Sequence[Shared | Stacked], lanes: int, backend: str) -> list[list[Any]]:
    """Each lane's own results."""

    def split(stacks: Sequence[Any]) -> list[list[Any]]:
        return [[x[i] for x in stacks] for i in range(lanes)]

    stacks = [r.value for r in results if isinstance(r, Stacked)]
    if backend == "cpu" and stacks and sum(J.nbytes(x) for x in stacks) <= SMALL_RESULTS:
        with J.cpu_small_call():
            parts = jax.jit(split)(stacks)
    elif backend == "gpu" and lanes > 1:
        parts = split([rows_at_once(x) for x in stacks])
    else:
        parts = split(stacks)
    rest = [iter(part) for part in parts]
    return [[next(rest[i]) if isinstance(r, Stacked) else r.value for r in results] for i in range(lanes)]


def rows_at_once(stack: Any) -> list[Any]:
    """The rows of a stack, which XLA copies on a GPU by one kernel that writes all of them. Slices that it knows not to
    overlap it copies one by one, a launch each; so it is not told where they begin."""
    none = lax.optimization_barrier(np.uint32(0))
    places = [none + np.uint32(i) for i in range(stack.shape[0])]
    return [lax.dynamic_index_in_dim(stack, place, 0, keepdims=False) for place in places]
