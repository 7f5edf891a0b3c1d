"""Vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) for inference, NHWC.

Pre-norm, a class token, learned positions; GELU in its tanh form, as in the authors' code. Dropout is the
identity. Layer normalisation runs in float32, with float32 parameters, whatever the dtype.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike


class Block(nn.Module):
    """Self-attention, then a feed-forward network four times as wide; each reads a normalised x and is added to x."""

    heads: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=jnp.float32)
        hidden = x.shape[-1]
        y = norm()(x.astype(jnp.float32)).astype(self.dtype)
        x += nn.MultiHeadDotProductAttention(self.heads, **types)(y)
        y = norm()(x.astype(jnp.float32)).astype(self.dtype)
        y = nn.gelu(nn.Dense(4 * hidden, **types)(y))
        return x + nn.Dense(hidden, **types)(y)


class ViT(nn.Module):
    """Images `[batch, height, width, 3]` to logits `[batch, classes]`, both in `dtype`. Each patch has its position, so
    parameters fit one image size."""

    layers: int
    hidden: int
    heads: int
    patch: int = 16
    classes: int = 1000
    image_size: int = 224
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        patch = (self.patch, self.patch)
        x = nn.Conv(self.hidden, patch, strides=patch, padding="VALID", **types)(x)
        x = x.reshape(x.shape[0], -1, self.hidden)

        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.hidden), self.param_dtype)
        token = jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], 1, self.hidden))
        x = jnp.concatenate([token, x], axis=1)
        shape = (1, x.shape[1], self.hidden)
        positions = self.param("positions", nn.initializers.normal(0.02), shape, self.param_dtype)
        x += positions.astype(self.dtype)

        for _ in range(self.layers):
            x = Block(self.heads, **types)(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32)(x.astype(jnp.float32)).astype(self.dtype)
        return nn.Dense(self.classes, **types)(x[:, 0])

    @nn.nowrap
    def example(self, key: jax.Array, batch: int = 1) -> tuple[jax.Array]:
        return (jax.random.normal(key, (batch, self.image_size, self.image_size, 3), self.dtype),)


vit_ti16 = partial(ViT, layers=12, hidden=192, heads=3)  # the size of DeiT-Ti (Touvron et al. 2021, arXiv 2012.12877)
vit_b16 = partial(ViT, layers=12, hidden=768, heads=12)
