"""SE-ResNet-50 and SENet-154 (Hu et al. 2018, arXiv 1709.01507) for inference, NHWC: residual networks whose channels
are scaled by gates that a small network computes from the channels' means.

As in ResNet version 1.5 here, a block strides in its 3x3 convolution, and padding is explicit and symmetric. SENet-154
differs from a ResNet-152 with gates in what the paper's appendix lists: grouped 3x3 convolutions with twice the
channels, a stem of three 3x3 convolutions, 3x3 shortcuts where the image shrinks. Dropout is the identity.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from coalesce.models.resnet import ConvNorm


class Gates(nn.Module):
    """Squeeze and excitation (section 3): every channel times a number between 0 and 1."""

    reduction: int = 16
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        channels = x.shape[-1]
        gates = nn.relu(dense(channels // self.reduction)(x.mean(axis=(1, 2))))
        return x * nn.sigmoid(dense(channels)(gates))[:, None, None, :]


class GatedBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, gates, and a shortcut. `inside` says how many times `width` the first two have."""

    width: int
    stride: int = 1
    inside: tuple[int, int] = (1, 1)
    groups: int = 1
    shortcut_kernel: int = 1
    reduction: int = 16
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(ConvNorm, **types)
        narrow, filtered = (times * self.width for times in self.inside)
        y = nn.relu(conv(narrow, kernel=1)(x))
        y = nn.relu(conv(filtered, kernel=3, stride=self.stride, groups=self.groups)(y))
        y = Gates(self.reduction, **types)(conv(4 * self.width, kernel=1)(y))
        if x.shape != y.shape:
            kernel = self.shortcut_kernel if self.stride > 1 else 1
            x = conv(4 * self.width, kernel, self.stride, name="shortcut")(x)
        return nn.relu(x + y)


class SENet(nn.Module):
    """Images `[batch, height, width, 3]` to logits `[batch, classes]`, both in `dtype`; sizes from 32 up fit the
    same parameters. `stages` counts the blocks at each width, `stem` has (kernel, channels) of its convolutions, of
    which the first strides."""

    stages: tuple[int, ...]
    stem: tuple[tuple[int, int], ...] = ((7, 64),)
    width: int = 64
    inside: tuple[int, int] = (1, 1)
    groups: int = 1
    shortcut_kernel: int = 1
    reduction: int = 16
    classes: int = 1000
    image_size: int = 224
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        how = (self.inside, self.groups, self.shortcut_kernel, self.reduction)
        for layer, (kernel, channels) in enumerate(self.stem):
            x = nn.relu(ConvNorm(channels, kernel, stride=2 if layer == 0 else 1, **types)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for stage, blocks in enumerate(self.stages):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                x = GatedBottleneck(self.width * 2**stage, stride, *how, **types)(x)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.classes, **types)(x)

    @nn.nowrap
    def example(self, key: jax.Array, batch: int = 1) -> tuple[jax.Array]:
        return (jax.random.normal(key, (batch, self.image_size, self.image_size, 3), self.dtype),)


se_resnet50 = partial(SENet, stages=(3, 4, 6, 3))
senet154 = partial(
    SENet,
    stages=(3, 8, 36, 3),
    stem=((3, 64), (3, 64), (3, 128)),
    inside=(2, 4),
    groups=64,
    shortcut_kernel=3,
)
