"""ResNet (He et al. 2016, arXiv 1512.03385) for inference, NHWC.

Version 1.5, as torchvision and NVIDIA publish it: a bottleneck strides in its 3x3 convolution, not in the
first 1x1. Padding is explicit and symmetric, as in PyTorch, because SAME pads a strided convolution on one
side only. Batch normalisation reads running statistics, so a row's result does not depend on its batch.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike


class ConvNorm(nn.Module):
    """A convolution without bias, then batch normalisation: in float32, with float32 parameters, whatever `dtype`."""

    features: int
    kernel: int
    stride: int = 1
    groups: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(
            self.features,
            kernel_size=(self.kernel, self.kernel),
            strides=self.stride,
            padding=self.kernel // 2,
            feature_group_count=self.groups,
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )(x)
        norm = nn.BatchNorm(use_running_average=True, epsilon=1e-5, dtype=jnp.float32)
        return norm(x.astype(jnp.float32)).astype(self.dtype)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (figure 5, left)."""

    width: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(ConvNorm, dtype=self.dtype, param_dtype=self.param_dtype)
        y = nn.relu(conv(self.width, kernel=3, stride=self.stride)(x))
        y = conv(self.width, kernel=3)(y)
        if x.shape != y.shape:
            x = conv(self.width, kernel=1, stride=self.stride, name="shortcut")(x)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide, and a shortcut (figure 5, right)."""

    width: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(ConvNorm, dtype=self.dtype, param_dtype=self.param_dtype)
        y = nn.relu(conv(self.width, kernel=1)(x))
        y = nn.relu(conv(self.width, kernel=3, stride=self.stride)(y))
        y = conv(4 * self.width, kernel=1)(y)
        if x.shape != y.shape:
            x = conv(4 * self.width, kernel=1, stride=self.stride, name="shortcut")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Images `[batch, height, width, 3]` to logits `[batch, classes]`, both in `dtype`; sizes from 32 up fit the
    same parameters. `stages` counts the blocks at each width."""

    block: type[BasicBlock] | type[Bottleneck]
    stages: tuple[int, ...]
    width: int = 64
    classes: int = 1000
    image_size: int = 224
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ConvNorm(self.width, kernel=7, stride=2, dtype=self.dtype, param_dtype=self.param_dtype)(x)
        x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for stage, blocks in enumerate(self.stages):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                x = self.block(self.width * 2**stage, stride, dtype=self.dtype, param_dtype=self.param_dtype)(x)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.classes, dtype=self.dtype, param_dtype=self.param_dtype)(x)

    @nn.nowrap
    def example(self, key: jax.Array, batch: int = 1) -> tuple[jax.Array]:
        return (jax.random.normal(key, (batch, self.image_size, self.image_size, 3), self.dtype),)


# Table 1 of the paper.
resnet18 = partial(ResNet, block=BasicBlock, stages=(2, 2, 2, 2))
resnet34 = partial(ResNet, block=BasicBlock, stages=(3, 4, 6, 3))
resnet50 = partial(ResNet, block=Bottleneck, stages=(3, 4, 6, 3))
