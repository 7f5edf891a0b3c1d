"""A tenant's weights as a bank holds them: prepared, laid out, and side by side in one row of each slab.

It is a function of the tenant's raw weights alone, so that it can run on any thread, while the bank is in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from coalesce import jaxpr as J
from coalesce.serving.fit import Fit
from coalesce.serving.making import Jitted
from coalesce.serving.schema import Schema


def rows_recipe(
    schema: Schema,
    prepares: Sequence[Any],
    sources: Sequence[tuple[int, int]],
    leaves: list[list[jax.ShapeDtypeStruct]],
) -> Jitted:
    """The raw weights of each of a tenant's programs, which `prepares` prepare -> [1, ...] for each argument of the
    bank. `sources` as in `Fit`."""

    def rows(leaves: Sequence[Sequence[Any]]) -> list[jax.Array]:
        prepared = [
            list(own) if prepare is None else J.evaluate(prepare, own)
            for prepare, own in zip(prepares, leaves, strict=True)
        ]
        return [argument(prepared, i) for i in range(len(schema.slabs))]

    def argument(prepared: Sequence[Sequence[Any]], index: int) -> jax.Array:
        slab, end = schema.slabs[index], 0
        parts: list[jax.Array] = []
        for a, start in zip(slab.arrays, slab.starts, strict=True):
            array = schema.arrays[a]
            program, weight = sources[array.rows[0][1]]
            row = array.layouts[0](jnp.asarray(prepared[program][weight]))
            if not schema.owned(index):
                return row[None]
            parts += [jnp.zeros(start - end, row.dtype), row.reshape(-1)]
            end = start + row.size
        parts.append(jnp.zeros(slab.size - end, parts[0].dtype))
        return jnp.concatenate(parts)[None]

    return Jitted(jax.jit(rows), (leaves,))


def leaves_of(fit: Fit) -> list[list[Any]]:
    return [[leaf.value for leaf in program.leaves] for program in fit.programs]
