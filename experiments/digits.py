"""Eight classifiers of scikit-learn's scanned digits: three families of networks, each tenant with its own training
images and seed. The data ships with scikit-learn; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

Params = dict[str, Any]  # linen variables, batch statistics included
SHAPE, CLASSES = (8, 8), 10
HELD_OUT = 360  # images that no tenant trains on
BATCH = 64
OPTIMIZER = optax.adam(3e-3)


class ConvNet(nn.Module):
    """A small residual network with batch normalisation, on images [batch, 8, 8]."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        conv = partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(conv(16)(images[..., None])))
        for width, stride in ((16, 1), (32, 2)):
            y = nn.relu(norm()(conv(width, strides=stride)(x)))
            y = norm()(conv(width)(y))
            shortcut = x if x.shape == y.shape else conv(width, kernel_size=(1, 1), strides=stride)(x)
            x = nn.relu(shortcut + y)
        return nn.Dense(CLASSES)(x.mean(axis=(1, 2)))


class Perceptron(nn.Module):
    """Three dense layers, on the 64 pixels in a row."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images.reshape(images.shape[0], -1)
        for width in (64, 64):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(CLASSES)(x)


class RowReader(nn.Module):
    """An LSTM that reads an image as a sequence of eight rows."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        steps: Any = nn.RNN(nn.OptimizedLSTMCell(48))(images)
        return nn.Dense(CLASSES)(steps[:, -1])


@dataclass(frozen=True)
class Tenant:
    """A classifier to train: its network, and how many images of its own it learns from."""

    name: str
    network: nn.Module
    apply: Callable[[Params, jax.Array], jax.Array]
    seed: int
    images: int


def tenants() -> list[Tenant]:
    """Tenants of a family share one `apply`, as tenants of one model do; sizes differ so that accuracies do."""
    families: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "cnn": (ConvNet(), (400, 700, 1000)),
        "mlp": (Perceptron(), (400, 1000)),
        "lstm": (RowReader(), (400, 700, 1000)),
    }
    found = []
    for family, (network, sizes) in families.items():
        apply = partial(predict, network)
        for i, images in enumerate(sizes, 1):
            found.append(Tenant(f"{family}-{i}", network, apply, seed=len(found), images=images))
    return found


def predict(network: nn.Module, params: Params, images: jax.Array) -> jax.Array:
    """Logits; what is traced, and served."""
    logits: Any = network.apply(params, images)
    return logits


@dataclass(frozen=True)
class Split:
    """Images [n, 8, 8] between 0 and 1, and their digits."""

    images: np.ndarray
    labels: np.ndarray


def load() -> tuple[Split, Split]:
    """(training, held-out) scans, shuffled once, the same way every time."""
    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = (digits.images[order] / 16).astype(np.float32), digits.target[order].astype(np.int32)
    return Split(images[HELD_OUT:], labels[HELD_OUT:]), Split(images[:HELD_OUT], labels[:HELD_OUT])


def train(tenant: Tenant, data: Split, steps: int, after_step: Callable[[], object]) -> Params:
    """Parameters learnt from the tenant's own images, `BATCH` of them a step."""
    random = np.random.default_rng(tenant.seed)
    own = random.permutation(len(data.labels))[: tenant.images]
    params, state = start(tenant.network, jax.random.key(tenant.seed))
    for _ in range(steps):
        batch = random.choice(own, BATCH)
        params, state = step(tenant.network, params, state, data.images[batch], data.labels[batch])
        after_step()
    return params


@partial(jax.jit, static_argnums=0)
def start(network: nn.Module, key: jax.Array) -> tuple[Params, Any]:
    """Random parameters, and the optimizer's state for them."""
    params: Any = network.init(key, jnp.zeros((1, *SHAPE)))
    return params, OPTIMIZER.init(params["params"])


@partial(jax.jit, static_argnums=0)
def step(network: nn.Module, params: Params, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Params, Any]:
    """One step of the optimizer; batch statistics are updated along the way."""

    def loss(weights: Any) -> tuple[jax.Array, Any]:
        logits, updated = network.apply({**params, "params": weights}, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

    gradients, updated = jax.grad(loss, has_aux=True)(params["params"])
    change, state = OPTIMIZER.update(gradients, state, params["params"])
    return {**params, **updated, "params": optax.apply_updates(params["params"], change)}, state
