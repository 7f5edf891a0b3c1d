"""Strategies that draw models, and tenants that run them: `tenants()` is what the property tests are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from tests.program_control import extend
from tests.programs import Aval, kind_of, Model, Ref, Scope

RANKS = (2, 3, 4, 1, 0)
LANES = (2, 3, 4, 1)
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


@st.composite
def models(draw: Any, max_ops: int, dtypes: Sequence[Any] = (jnp.float32,)) -> Model:
    """A function of one to three inputs, the first of them of floats."""
    dtype = draw(st.sampled_from(dtypes))
    shapes = st.sampled_from(RANKS).flatmap(lambda rank: st.tuples(*[st.integers(1, 6)] * rank))
    kinds = [dtype, *draw(st.lists(st.sampled_from([jnp.int32, jnp.bool_, dtype]), max_size=2))]
    inputs = tuple(Aval(draw(shapes), jnp.dtype(kind)) for kind in kinds)
    scope = Scope(inputs, [True] * len(inputs), dtype)
    extend(draw, scope, draw(st.integers(1, max_ops)))
    block = scope.block()
    results = block.sinks(len(inputs))
    if len(results) > 1 and draw(st.booleans()):
        results = results[1:]  # something is computed in vain
    outputs: dict[str, Any] = {"results": [Ref(i, scope.exact[i]) for i in results]}
    if draw(st.booleans()):
        outputs["more"] = (Ref(0, True), 1.5, np.arange(3, dtype=np.int32))
    return Model(
        block,
        inputs,
        outputs,
        nested=draw(st.booleans()),
        returns_weight=draw(st.booleans()),
        gain=draw(st.sampled_from([1.0, 2.0])),
    )


@st.composite
def tenants(draw: Any, model: st.SearchStrategy[Model], max_families: int = 2, min_lanes: int = 1) -> list[Tenant]:
    """Tenants of a few models, in any order."""
    found: list[Tenant] = []
    pool: Pool = {}
    for _ in range(draw(st.integers(1, max_families))):
        if found and draw(st.booleans()):
            chosen = replace(found[0].model, gain=0.5)  # nearly, not quite, the same family
        else:
            chosen = draw(model)
        found += family(draw, chosen, draw(st.sampled_from([n for n in LANES if n >= min_lanes])), pool)
    return draw(st.permutations(found))


def family(draw: Any, model: Model, lanes: int, pool: Pool) -> list[Tenant]:
    """Tenants of one model. Each weight is a tenant's own, or one of two arrays that tenants share as drawn; where
    weights are tied, also those of one tenant that have one shape."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sharing = draw(st.sampled_from(["none", "all", "some"]))
    tie = draw(st.booleans())
    declared = sharing != "none" and draw(st.booleans())
    columns = []
    for k, aval in enumerate(model.block.weights):
        which = draw(st.lists(st.integers(0, 1), min_size=lanes, max_size=lanes)) if sharing == "some" else [0] * lanes
        keys = [(aval, g, 0 if tie else k) for g in which]
        for key in dict.fromkeys(keys):
            pool.setdefault(key, array(aval, rng, 0.4))
        columns.append([array(aval, rng, 0.4) if sharing == "none" else pool[key] for key in keys])
    found = []
    for lane in range(lanes):
        ops = [column[lane] for column in columns]
        if declared:
            ops = [jnp.asarray(np.asarray(w)) for w in ops]  # equal bytes, in arrays of their own
        params = {"ops": ops, "extra": array(Aval((2,), jnp.dtype(jnp.float32)), rng)}
        fn = model if draw(st.booleans()) else wrapped(model)
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
    return jnp.asarray(np.asarray(values, aval.dtype))


def alone(tenant: Tenant) -> Any:
    """What the tenant gets without anyone else."""
    return jax.jit(tenant.model)(tenant.params, *tenant.inputs)


def in_float32(tenant: Tenant) -> Tenant:
    """The tenant with float32 in the place of every other float."""

    def wide(x: Any) -> Any:
        return jnp.asarray(np.asarray(x, np.float32)) if kind_of(x) == "f" else x

    return replace(tenant, params=jax.tree.map(wide, tenant.params), inputs=jax.tree.map(wide, tenant.inputs))
