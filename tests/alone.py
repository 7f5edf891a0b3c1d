"""The reference of most tests: what each tenant computes alone, under its own `jax.jit`."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import coalesce
from tests.compare import assert_same
from tests.random_numbers import NUMBERS

Tenant = tuple[Callable[..., Any], Any, tuple[Any, ...]]  # fn, params, inputs


def array(*shape: int, dtype: Any = np.float32) -> jax.Array:
    """Other random numbers each time, the same ones in every run of a test."""
    return jax.device_put(np.asarray(NUMBERS.rng.standard_normal(shape), dtype))  # jnp.asarray compiles for each


def alone(tenant: Tenant) -> Any:
    """The outputs of one tenant. Leaves of params that are no arrays, such as activation functions, are closed over."""
    fn, params, inputs = tenant
    leaves, tree = jax.tree.flatten(params)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype") or isinstance(leaf, float)}
    others = tuple((i, leaf) for i, leaf in enumerate(leaves) if i not in arrays)
    try:
        run = jitted(fn, tree, others)
    except TypeError:  # of an object that is no key
        run = jitted.__wrapped__(fn, tree, others)
    return run(arrays, *inputs)


@lru_cache(maxsize=8)
def jitted(fn: Callable[..., Any], tree: Any, others: tuple[tuple[int, Any], ...]) -> Callable[..., Any]:
    """Tenants of one function are traced and compiled once."""

    def run(arrays: dict[int, Any], *xs: Any) -> Any:
        held = arrays | dict(others)
        return fn(tree.unflatten([held[i] for i in range(len(held))]), *xs)

    return jax.jit(run)


def fuse_tenants(tenants: Sequence[Tenant], **options: Any) -> coalesce.Fused:
    """Traced as "t0", "t1", ... and fused, with JAX's own type check after every pass."""
    programs = [coalesce.trace(fn, params, *xs, name=f"t{i}") for i, (fn, params, xs) in enumerate(tenants)]
    return coalesce.fuse(programs, strict=True, **options)


def check_fused(tenants: Sequence[Tenant], **options: Any) -> coalesce.Fused:
    """Fuse, call, compare with each alone; returns the fused program for a closer look."""
    fused = fuse_tenants(tenants, **options)
    results = fused([xs for _, _, xs in tenants])
    for tenant, result in zip(tenants, results, strict=True):
        want = alone(tenant)
        assert jax.tree.map(is_key, result) == jax.tree.map(is_key, want)
        assert_same(plain(result), plain(want))
    return fused


def plain(tree: Any) -> Any:
    """The pytree with key data in the place of keys, for comparing."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
