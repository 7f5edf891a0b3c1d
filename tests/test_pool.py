"""Max pools tap by tap, against JAX's own, lanes at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

from coalesce import pool
from coalesce.lanes import apply, plain, Shared, Stacked
from tests.programs import Draw

FIRST = {"max": (-jnp.inf, lax.max), "min": (jnp.inf, lax.min)}


def pooled(name: str, window: Any, strides: Any, padding: Any, **dilation: Any):
    first, fold = FIRST[name]
    return lambda x: lax.reduce_window(x, np.asarray(first, x.dtype), fold, window, strides, padding, **dilation)


def eqn_of(call: Any, x: Any) -> Any:
    (eqn,) = jax.make_jaxpr(call)(x).jaxpr.eqns
    return eqn


@settings(max_examples=max(5, settings().max_examples // 15))
@given(st.integers(0, 2**32 - 1))
def test_pools_are_as_written(seed: int) -> None:
    """Of any window, stride and padding, negative too, with numbers that are not finite; those that it cannot run it
    leaves alone, and the rest have nothing of JAX's own left."""
    pick = Draw(seed)
    shape = tuple(pick.integer(1, 6) for _ in range(pick.integer(1, 4)))
    window = tuple(pick.integer(1, 3) for _ in shape)
    strides = tuple(pick.integer(1, 3) for _ in shape)
    padding = tuple((pick.integer(-1, 3), pick.integer(-1, 3)) for _ in shape)
    if any(n + lo + hi < size for n, size, (lo, hi) in zip(shape, window, padding, strict=True)):
        return
    call = pooled(pick.choice(sorted(FIRST)), window, strides, padding)
    dtype = pick.choice(["float32", "bfloat16"])
    values = np.random.default_rng(seed).choice([-jnp.inf, -1.0, 0.5, 2.0, jnp.inf, jnp.nan], (3, *shape))
    x = jnp.asarray(values, dtype)
    eqn = eqn_of(call, x[0])
    want = jnp.stack([call(lane) for lane in x])
    (got,), (alone,) = apply(eqn, [Stacked(x)]), apply(eqn, [Shared(x[0])])
    np.testing.assert_array_equal(np.asarray(plain(got).value, np.float32), np.asarray(want, np.float32))
    np.testing.assert_array_equal(np.asarray(plain(alone).value, np.float32), np.asarray(want[0], np.float32))
    if pool.supports(eqn):
        text = str(jax.make_jaxpr(lambda v: plain(apply(eqn, [Stacked(v)])[0]).value)(x))
        assert "reduce_window" not in text


X = jnp.ones((1, 6, 6, 2))
POOLS = {
    "of a network": (pooled("max", (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))), True),
    "that do not overlap": (pooled("max", (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), True),
    "of a whole image": (pooled("max", (1, 6, 6, 1), (1, 1, 1, 1), "VALID"), False),
    "with windows in the padding": (pooled("max", (1, 2, 2, 1), (1, 2, 2, 1), ((0, 0), (2, 0), (0, 0), (0, 0))), False),
    "dilated": (pooled("max", (1, 2, 2, 1), (1, 1, 1, 1), "VALID", window_dilation=(1, 2, 2, 1)), False),
}


@pytest.mark.parametrize(("call", "runs"), POOLS.values(), ids=POOLS)
def test_which_pools_it_runs(call, runs):
    assert pool.supports(eqn_of(call, X)) == runs


@pytest.mark.parametrize(("name", "barriers"), [("of a network", 1), ("that do not overlap", 0)])
def test_what_windows_share_is_made_once(name, barriers):
    eqn = eqn_of(POOLS[name][0], X)
    assert str(jax.make_jaxpr(lambda x: pool.run(eqn, x))(X)).count("optimization_barrier") == barriers


def test_its_derivative_is_that_of_the_first_of_equal_elements():
    """As JAX's own, and not shared among them: of images with regions of one colour, and lane by lane."""
    call = POOLS["of a network"][0]
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, *X.shape)), jnp.float32)
    eqn = eqn_of(call, x[0])

    def total(run: Any) -> Any:
        return jax.grad(lambda v: (run(v) * jnp.arange(3.0).reshape(3, 1, 1, 1, 1)).sum())

    got = total(lambda v: plain(apply(eqn, [Stacked(v)])[0]).value)(x)
    np.testing.assert_array_equal(got, total(jax.vmap(call))(x))
