"""What is computed in 16 bits, however deep inside, in float32: the reference that tenants are verified by."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from coalesce import jaxpr as J


def program(dtype: Any) -> Any:
    """Loops, branches and calls that cast to `dtype` inside."""

    @jax.checkpoint
    def half(x: Any) -> Any:
        return x * jnp.asarray(0.5, dtype)

    counts = jnp.array([0, 2])

    def fn(w: Any, x: Any, n: Any) -> Any:
        w = w.astype(dtype)

        def step(h: Any, i: Any) -> Any:
            return jnp.tanh(h.astype(dtype) @ w).astype(jnp.float32), i * 2

        h, doubled = lax.scan(step, x, jnp.arange(3))
        h = lax.fori_loop(0, n, lambda i, h: (half(h.astype(dtype)) @ w).astype(jnp.float32), h)
        h = jax.vmap(lambda m, r: lax.fori_loop(0, m, lambda i, r: half(r.astype(dtype)).astype(r.dtype), r))(counts, h)
        h = lax.cond(n > 1, lambda h: jax.jit(jnp.sin)(h.astype(dtype)), lambda h: h.astype(dtype), h)
        return h, doubled

    return fn


def test_loops_branches_and_calls_are_in_float32():
    rng = np.random.default_rng(0)
    given = rng.standard_normal((8, 8)).astype(np.float32), rng.standard_normal((2, 8)).astype(np.float32), np.int32(2)
    jaxpr, _ = J.stage(program(jnp.bfloat16), *given)
    got, doubled = J.evaluate_widened(jaxpr, given)
    want, _ = program(jnp.float32)(*given)
    low, _ = program(jnp.bfloat16)(*given)
    assert got.dtype == jnp.float32 and doubled.tolist() == [0, 2, 4]
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    assert np.linalg.norm(low.astype(jnp.float32) - want) > 1e-3 * np.linalg.norm(want)


def test_what_depends_on_the_width_is_refused():
    jaxpr, _ = J.stage(lambda x: lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16), np.ones(2, np.float32))
    with pytest.raises(TypeError, match="bitcast_convert_type of 16 bits"):
        J.evaluate_widened(jaxpr, [np.ones(2, np.float32)])
