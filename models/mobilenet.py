"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) for inference, NHWC: depthwise convolutions on wide layers.

As torchvision publishes it: padding is explicit and symmetric, the last convolution has 1280 channels. Dropout is the
identity.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from coalesce.models.resnet import ConvNorm


class InvertedResidual(nn.Module):
    """A 1x1 convolution widens, a depthwise 3x3 filters and a 1x1 narrows again, without activation; the shortcut joins
    the narrow ends (figure 4d). A block that does not widen has no first convolution."""

    features: int
    expand: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(ConvNorm, dtype=self.dtype, param_dtype=self.param_dtype)
        wide = self.expand * x.shape[-1]
        y = nn.relu6(conv(wide, kernel=1)(x)) if self.expand > 1 else x
        y = nn.relu6(conv(wide, kernel=3, stride=self.stride, groups=wide)(y))
        y = conv(self.features, kernel=1)(y)
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    """Images `[batch, height, width, 3]` to logits `[batch, classes]`, both in `dtype`; sizes from 32 up fit the same
    parameters. `stages` holds (expansion, channels, blocks, stride of the first block) of each, as table 2 does."""

    stages: tuple[tuple[int, int, int, int], ...]
    stem: int = 32
    last: int = 1280
    classes: int = 1000
    image_size: int = 224
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(ConvNorm, dtype=self.dtype, param_dtype=self.param_dtype)
        block = partial(InvertedResidual, dtype=self.dtype, param_dtype=self.param_dtype)
        x = nn.relu6(conv(self.stem, kernel=3, stride=2)(x))
        for expand, features, blocks, stride in self.stages:
            for index in range(blocks):
                x = block(features, expand, stride if index == 0 else 1)(x)
        x = nn.relu6(conv(self.last, kernel=1)(x))
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.classes, dtype=self.dtype, param_dtype=self.param_dtype)(x)

    @nn.nowrap
    def example(self, key: jax.Array, batch: int = 1) -> tuple[jax.Array]:
        return (jax.random.normal(key, (batch, self.image_size, self.image_size, 3), self.dtype),)


# Table 2 of the paper.
mobilenetv2 = partial(
    MobileNet,
    stages=(
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ),
)
