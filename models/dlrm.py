"""DLRM (Naumov et al. 2019, arXiv 1906.00091): deep learning recommendation model, for inference.

The dense features pass a bottom MLP, every categorical feature looks up one row of its table, the dot products
of all pairs of these vectors join the bottom MLP's output, and a top MLP gives the click probability.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike


class DLRM(nn.Module):
    """Dense features `[batch, features]` in `dtype` and one row of each table, `[batch, tables]` int32, to click
    probabilities `[batch, 1]` in `dtype`.

    `bottom` ends in the width of a table's row. `max_rows` caps every table, as `--max-ind-range` does in the authors'
    code; an index beyond its table gives NaN, which is what `nn.Embed` does.
    """

    rows: tuple[int, ...]
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    features: int = 13
    max_rows: int | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, dense: jax.Array, indices: jax.Array) -> jax.Array:
        layer = partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        x = dense
        for width in self.bottom:
            x = nn.relu(layer(width)(x))

        vectors = [x]
        for table, rows in enumerate(self.capped_rows()):
            embed = nn.Embed(rows, self.bottom[-1], dtype=self.dtype, param_dtype=self.param_dtype)
            vectors.append(embed(indices[:, table]))
        stacked = jnp.stack(vectors, axis=1)
        products = jnp.einsum("bid,bjd->bij", stacked, stacked)
        below, left = np.tril_indices(len(vectors), k=-1)
        x = jnp.concatenate([x, products[:, below, left]], axis=1)

        for width in self.top:
            x = nn.relu(layer(width)(x))
        return nn.sigmoid(layer(1)(x))

    @nn.nowrap
    def capped_rows(self) -> Sequence[int]:
        return self.rows if self.max_rows is None else [min(rows, self.max_rows) for rows in self.rows]

    @nn.nowrap
    def example(self, key: jax.Array, batch: int = 1) -> tuple[jax.Array, jax.Array]:
        dense_key, index_key = jax.random.split(key)
        rows = jnp.array([self.capped_rows()])
        return (
            jax.random.normal(dense_key, (batch, self.features), self.dtype),
            jax.random.randint(index_key, (batch, len(self.rows)), 0, rows),
        )


# The authors' Criteo Kaggle benchmark (bench/dlrm_s_criteo_kaggle.sh) and that data set's table sizes: 540 million
# parameters, nearly all of them in tables, so experiments with many tenants set `max_rows`.
dlrm = partial(
    DLRM,
    rows=(
        *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
        *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
    ),
    bottom=(512, 256, 64, 16),
    top=(512, 256),
)
