"""Random models, and tenants that run them. See tests/programs.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.program_control import extend
from tests.programs import Aval, Draw, kind_of, Model, Ref, Scope

RANKS = (0, 1, 2, 3, 4)
LANES = (1, 2, 3, 4)
Pool = dict[Any, Any]  # arrays that families have in common


@dataclass(frozen=True, eq=False)
class Tenant:
    """A model with params and inputs."""

    model: Model
    fn: Callable[..., Any]  # the model itself, or another function object that does the same
    params: Any
    inputs: tuple[Any, ...]
    shared: Any  # the subtree of params that is declared as shared, or None

    def __repr__(self) -> str:
        return f"Tenant({self.model}{', shared' if self.shared is not None else ''})"


def draw_model(draw: Draw, ops: int, dtype: Any) -> Model:
    """A function of one to three inputs, the first of them of floats; fewer ops of the same seed are its beginning."""
    kinds = [dtype] + [draw.choice([jnp.int32, jnp.bool_, dtype]) for _ in range(draw.integer(0, 2))]
    inputs = tuple(Aval(tuple(draw.integer(1, 6) for _ in range(draw.choice(RANKS))), jnp.dtype(k)) for k in kinds)
    nested, returns_weight, more, in_vain = (draw.flag() for _ in range(4))
    gain = draw.choice([1.0, 2.0])
    scope = Scope(inputs, [True] * len(inputs), dtype)
    extend(draw, scope, ops)
    block = scope.block()
    results = block.sinks(len(inputs))
    if len(results) > 1 and in_vain:
        results = results[1:]
    outputs: dict[str, Any] = {"results": [Ref(i, scope.exact[i]) for i in results]}
    if more:
        outputs["more"] = (Ref(0, True), 1.5, np.arange(3, dtype=np.int32))
    return Model(block, inputs, outputs, nested, returns_weight, gain)


def draw_tenants(draw: Draw, ops: int, families: int, dtype: Any) -> list[Tenant]:
    """Tenants of a few models, in any order."""
    found: list[Tenant] = []
    pool: Pool = {}
    for _ in range(families):
        if found and draw.flag():
            model = replace(found[0].model, gain=0.5)  # nearly, not quite, the same family
        else:
            model = draw_model(draw, ops, dtype)
        found += draw_family(draw, model, draw.choice(LANES), pool)
    return draw.shuffled(found)


def draw_family(draw: Draw, model: Model, lanes: int, pool: Pool) -> list[Tenant]:
    """Tenants of one model. Each weight is a tenant's own, or one of two arrays that tenants share as drawn; where
    weights are tied, also those of one tenant that have one shape."""
    rng = np.random.default_rng(draw.getrandbits(32))
    sharing = draw.choice(["none", "all", "some"])
    tie, declared = draw.flag(), sharing != "none" and draw.flag()
    columns = []
    for k, aval in enumerate(model.block.weights):
        groups = [draw.integer(0, 1) if sharing == "some" else 0 for _ in range(lanes)]
        keys = [(aval, group, 0 if tie else k) for group in groups]
        for key in dict.fromkeys(keys):
            pool.setdefault(key, array(aval, rng, 0.4))
        columns.append([array(aval, rng, 0.4) if sharing == "none" else pool[key] for key in keys])
    found = []
    for lane in range(lanes):
        ops = [column[lane] for column in columns]
        if declared:
            ops = [jax.device_put(np.array(w)) for w in ops]  # equal bytes, in arrays of their own
        params = {"ops": ops, "extra": array(Aval((2,), jnp.dtype(jnp.float32)), rng)}
        fn = model if draw.flag() else wrapped(model)
        inputs = model.pack([array(aval, rng) for aval in model.inputs])
        found.append(Tenant(model, fn, params, inputs, ops if declared else None))
    return found


def wrapped(model: Model) -> Callable[..., Any]:
    """Another function object, so that the tenant is traced by itself."""
    return lambda params, *inputs: model(params, *inputs)


def array(aval: Any, rng: np.random.Generator, scale: float = 1.0) -> Any:
    """Normal floats, integers from 0 to 7, fair bools; made by numpy, which compiles nothing."""
    match kind_of(aval):
        case "f":
            values = scale * rng.standard_normal(aval.shape)
        case "b":
            values = rng.random(aval.shape) < 0.5
        case _:
            values = rng.integers(0, 8, aval.shape)
    return jax.device_put(np.asarray(values, aval.dtype))  # jnp.asarray compiles a copy, for every shape


def alone(tenant: Tenant) -> Any:
    """What the tenant gets without anyone else."""
    return tenant.model.jitted(tenant.params, *tenant.inputs)


def in_float32(tenant: Tenant) -> Tenant:
    """The tenant with float32 in the place of every other float."""

    def wide(x: Any) -> Any:
        return jax.device_put(np.asarray(x, np.float32)) if kind_of(x) == "f" else x

    return replace(tenant, params=jax.tree.map(wide, tenant.params), inputs=jax.tree.map(wide, tenant.inputs))
