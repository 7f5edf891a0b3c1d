"""Every framework's way of calling a model: three tenants each, fused and alone; and all of them in one program."""

from importlib.util import find_spec

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from tests.alone import array, check_fused

TENANTS = 3


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, *, train=False):
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(linen.Conv(4, (3, 3))(x)))
        x = linen.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return {"logits": linen.Dense(5)(x), "features": x}


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.dropout(x.mean((1, 2))))


class EqxNet(eqx.Module):
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm
    scale: float = 0.5

    def __call__(self, x):
        return jax.vmap(self.norm)(jax.vmap(self.mlp)(x)) * self.scale


def of_linen():
    module = LinenNet()
    for seed in range(TENANTS):
        image = array(2, 8, 8, 3)
        yield module.apply, module.init(jax.random.key(seed), image), (image,)


def of_nnx():
    models = [NnxNet(nnx.Rngs(seed)) for seed in range(TENANTS)]
    for model in models:
        model.eval()
        graph, state = nnx.split(model)
        yield lambda state, x, graph=graph: nnx.merge(graph, state)(x), state, (array(2, 8, 8, 3),)


def of_nnx_in_parts():
    """Params apart from the rest, which the function closes over."""
    for seed in range(TENANTS):
        model = NnxNet(nnx.Rngs(seed))
        model.eval()
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def apply(params, x, graph=graph, rest=rest):
            return nnx.merge(graph, params, rest)(x)

        yield apply, params, (array(2, 8, 8, 3),)


def eqx_net(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    return EqxNet(eqx.nn.MLP(4, 5, 8, 2, key=keys[0]), eqx.nn.LayerNorm(5))


def of_equinox():
    """The model itself is the params; its activation functions are leaves, too."""
    for seed in range(TENANTS):
        yield (lambda model, x: model(x)), eqx_net(seed), (array(2, 4),)


def of_equinox_in_parts():
    for seed in range(TENANTS):
        arrays, static = eqx.partition(eqx_net(seed), eqx.is_array)
        yield (lambda arrays, x, static=static: eqx.combine(arrays, static)(x)), arrays, (array(2, 4),)


def of_keras():
    import keras

    assert keras.backend.backend() == "jax"
    layers = keras.layers

    def net():
        return keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(4, 3, activation="relu"),
                layers.BatchNormalization(),
                layers.GlobalAveragePooling2D(),
                layers.Dropout(0.5),
                layers.Dense(5),
            ]
        )

    for _ in range(TENANTS):
        model = net()
        params = [[v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables)]

        def apply(params, x, model=model):
            return model.stateless_call(*params, x, training=False)[0]

        yield apply, params, (array(2, 8, 8, 3),)


def of_functions():
    def apply(params, x):
        for w, b in params:
            x = jnp.tanh(x @ w + b[None])
        return x, {"norm": jnp.sqrt((x * x).sum())}

    for _ in range(TENANTS):
        yield apply, [(array(4, 8), np.asarray(array(8))), (array(8, 5), array(5))], (array(2, 4),)


# How many heavy ops a tenant has; all of them in packs of all tenants.
FRAMEWORKS = {
    of_linen: 2,
    of_nnx: 2,
    of_nnx_in_parts: 2,
    of_equinox: 3,
    of_equinox_in_parts: 3,
    of_functions: 2,
}
if find_spec("keras"):
    FRAMEWORKS[of_keras] = 2


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda f: f.__name__)
def test_three_tenants(framework):
    report = check_fused(list(framework())).report
    heavy = FRAMEWORKS[framework]
    assert (report.families, report.heavy_ops, report.superkernels) == (1, TENANTS * heavy, heavy)
    assert report.alone == 0


@pytest.mark.usefixtures("standard_promotion")
def test_all_frameworks_in_one_program():
    by_framework = [list(framework()) for framework in FRAMEWORKS]
    mixed = [tenant for round_ in zip(*by_framework, strict=True) for tenant in round_]
    report = check_fused(mixed).report
    assert (report.programs, report.alone) == (TENANTS * len(FRAMEWORKS), 0)
    # Both ways of nnx are one family. Those of equinox are two: a float is a weight as a leaf, a literal closed over.
    assert report.families == len(FRAMEWORKS) - 1
