"""A plain multi-layer perceptron: the smallest tenant, bound by launches and not by arithmetic."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike


class MLP(nn.Module):
    """`[batch, width]` to `[batch, width]`, both in `dtype`, through `layers` dense layers with ReLU between them."""

    layers: int = 24
    width: int = 16
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(self.layers):
            x = x if layer == 0 else nn.relu(x)
            x = nn.Dense(
                self.width,
                kernel_init=nn.initializers.he_normal(),  # keeps the scale of x through many ReLU layers
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )(x)
        return x

    @nn.nowrap
    def example(self, key: jax.Array, batch: int = 1) -> tuple[jax.Array]:
        return (jax.random.normal(key, (batch, self.width), self.dtype),)
