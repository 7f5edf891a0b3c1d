"""The reference of most tests: what each tenant computes alone, under its own `jax.jit`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import coalesce

Tenant = tuple[Callable[..., Any], Any, tuple[Any, ...]]  # fn, params, inputs


def alone(tenant: Tenant) -> Any:
    """The outputs of one tenant. Leaves of params that are no arrays, such as equinox's activations, are closed over."""
    fn, params, inputs = tenant
    leaves, tree = jax.tree.flatten(params)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype") or isinstance(leaf, float)}

    def run(arrays: dict[int, Any], *xs: Any) -> Any:
        return fn(tree.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)]), *xs)

    return jax.jit(run)(arrays, *inputs)


def fuse_tenants(tenants: Sequence[Tenant], **options: Any) -> coalesce.Fused:
    """Traced as "t0", "t1", ... and fused, with JAX's own type check after every pass."""
    programs = [coalesce.trace(fn, params, *xs, name=f"t{i}") for i, (fn, params, xs) in enumerate(tenants)]
    return coalesce.fuse(programs, strict=True, **options)


def check_fused(tenants: Sequence[Tenant], **options: Any) -> coalesce.Fused:
    """Fuse, call, compare with each alone; returns the fused program for a closer look."""
    fused = fuse_tenants(tenants, **options)
    results = fused([xs for _, _, xs in tenants])
    for tenant, result in zip(tenants, results, strict=True):
        assert_same(result, alone(tenant))
    return fused


def assert_same(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Equal pytrees of equal types; floats within a relative norm, everything else exactly."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jax.typeof(g) == jax.typeof(w)  # shape, dtype and weak type
        if jax.dtypes.issubdtype(w.dtype, jax.dtypes.prng_key):
            g, w = jax.random.key_data(g), jax.random.key_data(w)
        if not jax.dtypes.issubdtype(w.dtype, np.inexact):
            np.testing.assert_array_equal(g, w)
            continue
        g, w = (np.asarray(a, np.complex128 if jax.dtypes.issubdtype(a.dtype, np.complexfloating) else np.float64)
                for a in (g, w))  # fmt: skip
        assert np.linalg.norm(g - w) <= tolerance * np.linalg.norm(w)
