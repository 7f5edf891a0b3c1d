"""LSTM and GRU sequence classifiers: recurrent layers by `nn.RNN` (one `lax.scan` each), then a dense head.

LSTM: Hochreiter and Schmidhuber 1997. GRU: Cho et al. 2014 (arXiv 1406.1078), with the reset gate applied
after the product, as in cuDNN. The LSTM cell is flax's optimized one, two products a step; flax has no such GRU
cell, so a GRU step is six. The default size, 512 units over 25 steps, is that of a DeepBench inference LSTM.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike


def orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """flax's default for recurrent kernels, in any dtype: its QR decomposition wants float32."""
    return nn.initializers.orthogonal()(key, shape, jnp.float32).astype(dtype)


class Recurrent(nn.Module):
    """Sequences `[batch, steps, features]` to logits `[batch, classes]` of the last step; these and the carry are in
    `dtype`."""

    cell: type[nn.OptimizedLSTMCell] | type[nn.GRUCell]
    layers: int = 1
    features: int = 512
    hidden: int = 512
    classes: int = 1000
    steps: int = 25
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for _ in range(self.layers):
            cell = self.cell(self.hidden, recurrent_kernel_init=orthogonal, **types)
            carry = cell.initialize_carry(jax.random.key(0), (x.shape[0], x.shape[2]))  # in param_dtype
            carry = jax.tree.map(lambda c: c.astype(self.dtype), carry)
            _, x = nn.RNN(cell, return_carry=True)(x, initial_carry=carry)
        return nn.Dense(self.classes, **types)(x[:, -1])

    @nn.nowrap
    def example(self, key: jax.Array, batch: int = 1) -> tuple[jax.Array]:
        return (jax.random.normal(key, (batch, self.steps, self.features), self.dtype),)


lstm = partial(Recurrent, cell=nn.OptimizedLSTMCell)
gru = partial(Recurrent, cell=nn.GRUCell)
