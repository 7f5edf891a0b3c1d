"""One view of all models, for experiments and tests: `by_name("resnet50", dtype=jnp.bfloat16).apply(params, x)`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from coalesce.models.dlrm import dlrm
from coalesce.models.mlp import MLP
from coalesce.models.mobilenet import mobilenetv2
from coalesce.models.recurrent import gru, lstm
from coalesce.models.resnet import resnet18, resnet34, resnet50
from coalesce.models.senet import se_resnet50, senet154
from coalesce.models.transformer import bert_base, bert_small
from coalesce.models.vgg import vgg16
from coalesce.models.vit import vit_b16, vit_ti16

Params = dict[str, Any]


@runtime_checkable
class Network(Protocol):
    """A linen module that can make its own inputs."""

    def apply(self, variables: Any, /, *args: Any, **kwargs: Any) -> Any: ...
    def lazy_init(self, rngs: Any, /, *args: Any, **kwargs: Any) -> Any: ...
    def example(self, key: jax.Array, batch: int = 1) -> tuple[jax.Array, ...]: ...


_NETWORKS: dict[str, Callable[..., Network]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "se_resnet50": se_resnet50,
    "senet154": senet154,
    "mobilenetv2": mobilenetv2,
    "vgg16": vgg16,
    "vit_ti16": vit_ti16,
    "vit_b16": vit_b16,
    "bert_base": bert_base,
    "bert_small": bert_small,
    "lstm": lstm,
    "gru": gru,
    "dlrm": dlrm,
    "mlp": MLP,
}
NAMES = tuple(_NETWORKS)


@dataclass(frozen=True)
class Model:
    """A configured network without weights. `apply(params, *inputs)` is one function object, however many tenants
    share the model; `params` is the linen variables dict, batch statistics included."""

    name: str
    network: Network
    apply: Callable[..., jax.Array]

    def init(self, key: jax.Array) -> Params:
        """Random parameters; only initializers run, not the network."""
        return self.network.lazy_init(key, *self.inputs())

    def inputs(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes and dtypes of a request of `batch` rows."""
        return jax.eval_shape(partial(self.example, batch=batch), jax.random.key(0))

    def example(self, key: jax.Array, batch: int = 1) -> tuple[jax.Array, ...]:
        """A random request of `batch` rows."""
        return self.network.example(key, batch)


def by_name(
    name: str, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32, **overrides: Any
) -> Model:
    """The model of that name, computing in `dtype`; `overrides` are fields of its network, such as `image_size`.

    Equal arguments give the same object, so that tenants of one model share its `apply` and what is traced from it.
    Overrides must be hashable for that: tuples, not lists.
    """
    if name not in _NETWORKS:
        raise ValueError(f"no model is called {name!r}; choose one of {', '.join(NAMES)}")
    network = _NETWORKS[name](dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype), **overrides)
    return _model(name, network)


@cache
def _model(name: str, network: Network) -> Model:
    def apply(params: Params, *inputs: jax.Array) -> jax.Array:
        return network.apply(params, *inputs)

    return Model(name, network, apply)
