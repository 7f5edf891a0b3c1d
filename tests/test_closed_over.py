"""Arrays that a function closes over, wherever JAX keeps them: weights, as at the top of a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import coalesce
from coalesce.passes.pipeline import normalise
from coalesce.serving.fit import fit
from tests.alone import array, check_fused

N = 4


def layered(shared: Any) -> Callable[..., Any]:
    """A tenant of its own weights, all of which it closes over, in calls inside of loops, branches and derivatives."""
    w, u, bias, key = array(N, N), array(N, N), np.asarray(array(1, N)), jax.random.key(3)
    dense = jax.jit(lambda v: jnp.tanh(v @ w))
    other = jax.jit(lambda v: dense(v) @ (2 * u).T + bias)
    noisy = jax.jit(lambda v: v + jax.random.uniform(key, v.shape))
    common = jax.jit(lambda v: v @ shared)

    def nested(c: Any, x: Any) -> Any:
        inner, _ = lax.scan(lambda d, _: (other(d), None), c, None, length=2)
        return jnp.tanh(inner + x), common(c)

    def apply(_: Any, x: Any) -> Any:
        scanned = lax.scan(nested, x, jnp.stack([x, -x]), reverse=True)
        looped = lax.while_loop(lambda v: common(v).sum() < 3, lambda v: v + jnp.abs(noisy(v)) + 0.1, jnp.abs(x))
        rows = jax.vmap(lambda r: lax.while_loop(lambda v: v.sum() < 3, lambda v: v + jnp.abs(dense(v)) + 0.1, r))(x)
        branched = lax.cond(x[0, 0] > 0, dense, other, x)
        steep = jax.grad(lambda v: lax.scan(jax.checkpoint(lambda c, _: (dense(c), None)), v, None, 2)[0].sum())(x)
        return scanned, looped, rows, branched, steep

    return apply


def test_they_are_weights_in_calls_inside_of_loops_and_branches():
    """Tenants that differ in them alone are one family, and what is the same array is kept once."""
    shared = array(N, N)
    fused = check_fused([(layered(shared), (), (array(2, N),)) for _ in range(3)])
    assert fused.report.families == 1
    lanes = {len(a.rows) for a in fused.bundle.arrays if a.shape == (N, N)}
    assert lanes == {1, 3} and fused.report.superkernels > 5


def test_they_are_weights_for_a_runtime_too():
    program = coalesce.trace(layered(array(N, N)), (), array(2, N), name="a")
    assert len(program.leaves) == 5 and all(leaf.constant for leaf in program.leaves)
    assert not any(fit([normalise(program).program]).own)


def test_those_inside_of_what_is_no_call_are_structure():
    """They belong to what a reduction computes, and tell it from others."""

    def reduced(by: float) -> Callable[..., Any]:
        table = jnp.full(N, by)
        combine = jax.jit(lambda a, b: a + b * table[1])
        return lambda w, x: lax.map(lambda v: lax.reduce(v @ w, np.float32(0), combine, (0,)), x)

    one, other = reduced(1.0), reduced(2.0)
    fused = check_fused([(fn, array(N, N), (array(2, N),)) for fn in (one, other, one)])
    assert fused.report.families == 2
