"""VGG-16 (Simonyan and Zisserman 2015, arXiv 1409.1556) for inference, NHWC; dropout is the identity."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike


class VGG(nn.Module):
    """Images `[batch, height, width, 3]` to logits `[batch, classes]`, both in `dtype`. `stages` holds the widths of
    the convolutions before each pooling.

    The first dense layer has as many rows as the last feature map has values, so parameters fit one image size.
    """

    stages: tuple[tuple[int, ...], ...]
    hidden: int = 4096
    classes: int = 1000
    image_size: int = 224
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(
            nn.Conv,
            kernel_size=(3, 3),
            padding=1,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        for widths in self.stages:
            for width in widths:
                x = nn.relu(conv(width)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(dense(self.hidden)(x))
        x = nn.relu(dense(self.hidden)(x))
        return dense(self.classes)(x)

    @nn.nowrap
    def example(self, key: jax.Array, batch: int = 1) -> tuple[jax.Array]:
        return (jax.random.normal(key, (batch, self.image_size, self.image_size, 3), self.dtype),)


# Table 1 of the paper, column D.
vgg16 = partial(VGG, stages=((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)))
