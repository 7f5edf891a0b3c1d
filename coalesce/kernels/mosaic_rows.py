"""Work on rows of tiles that lie as wgmma leaves them; what is one number for each row is [rows]."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from coalesce import jaxpr as J
from coalesce.kernels.attention import REDUCTIONS, SAME
from coalesce.kernels.epilogue import on_tile
from coalesce.kernels.mosaic import backend, GROUP, iota, load, relaid

# Along rows, and of two such.
OVER = {"reduce_sum": (jnp.sum, jnp.add), "reduce_max": (jnp.max, jnp.maximum), "reduce_min": (jnp.min, jnp.minimum)}


class WgmmaTiles:
    """As attention.Tiles."""

    @staticmethod
    def on(eqn: J.Eqn, args: Sequence[Any]) -> Any:
        name, dtype = eqn.primitive.name, J.dtype(eqn.outvars[0])
        if name in SAME:
            return args[0]
        shape = max(map(jnp.shape, args), key=len)
        if name == "div" and jnp.dtype(dtype).itemsize == 2 and len(shape) == 2 and jnp.ndim(args[1]) == 1:
            # a division a row, and not a number: what that rounds besides is less than what the dtype does
            times = WgmmaTiles.spread(1.0 / args[1].astype(jnp.float32), shape)
            return (args[0].astype(jnp.float32) * times).astype(dtype)
        return on_tile(eqn, [WgmmaTiles.spread(x, shape) for x in args])

    @staticmethod
    def spread(x: Any, shape: Sequence[int]) -> Any:
        return x if jnp.shape(x) == tuple(shape) else lax.broadcast_in_dim(x, shape, range(jnp.ndim(x)))

    @staticmethod
    def reduced(eqn: J.Eqn, tiles: Sequence[Any], valid: Sequence[Any]) -> Any:
        name = eqn.primitive.name
        over, two = OVER[name]
        wide = [only(own, x.astype(jnp.float32), REDUCTIONS[name]) for x, own in zip(tiles, valid, strict=True)]
        return reduce(two, [over(x, axis=1) for x in wide]).astype(J.dtype(eqn.outvars[0]))


def only(valid: Any, tile: Any, rest: float = 0.0) -> Any:
    """The valid elements of a tile, and `rest` for others."""
    return tile if valid is None else jnp.where(valid, tile, jnp.full_like(tile, rest))


def inside(columns: int, shape: Sequence[int]) -> Any:
    """Which columns of a tile are among so many; None: all."""
    return iota(shape, 1) < columns if columns < shape[1] else None


def over_rows(x: Any, dtype: Any, span: tuple[int, int]) -> Any:
    """A tile of a number, or of what lies in shared memory over its columns: where they begin, and how many."""
    shape = (GROUP, span[1])
    if jnp.ndim(x) == 0:
        return lax.broadcast_in_dim(x.astype(dtype), shape, ())
    vector = load(x.at[pl.ds(*span)], backend().Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(vector.astype(dtype), shape, (1,))


def widened(tile: Any) -> Any:
    """As wide as what wgmma takes out of registers, with zeros."""
    missing = GROUP - tile.shape[1]
    if not missing:
        return tile
    return lax.concatenate([tile, relaid(jnp.zeros((GROUP, missing), tile.dtype), backend().Layout.WGMMA)], 1)
