"""PRNG keys as inputs, outputs, params and constants: raw and typed, with bits of each tenant's own."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import coalesce
from tests.alone import array, check_fused

KEYS = {
    "raw threefry": lambda seed: jax.random.PRNGKey(seed),
    "raw rbg": lambda seed: jax.random.key_data(jax.random.key(seed, impl="rbg")),
    "typed threefry": lambda seed: jax.random.key(seed),
    "typed rbg": lambda seed: jax.random.key(seed, impl="rbg"),
    "typed unsafe_rbg": lambda seed: jax.random.key(seed, impl="unsafe_rbg"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_as_inputs(kind):
    """Random bits are each tenant's own, bit for bit; keys come back as keys."""

    def apply(w, key, x):
        if kind == "raw rbg":
            key = jax.random.wrap_key_data(key, impl="rbg")
        ours, theirs = jax.random.split(key)
        noise = jax.random.bits(ours, x.shape) if w.ndim else None
        return noise, jax.random.randint(theirs, (3,), 0, 100), x @ w, theirs, jax.random.fold_in(key, 3)

    tenants = [(apply, array(4, 4), (KEYS[kind](seed), array(2, 4))) for seed in range(3)]
    assert check_fused(tenants).report.families == 1


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_arrays_of_keys(impl):
    def apply(w, keys):
        return (jax.vmap(lambda k: jax.random.bits(k, (2,)))(keys), keys[1:], w)

    check_fused([(apply, array(3), (jax.random.split(jax.random.key(s, impl=impl), 4),)) for s in range(3)])


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_in_params_and_closed_over(impl):
    constant = jax.random.key(7, impl=impl)

    def apply(params, x):
        bits = jax.random.bits(params["key"], x.shape), jax.random.bits(constant, (2,))
        return x @ params["w"], bits, params["key"]

    check_fused([(apply, {"key": jax.random.key(s, impl=impl), "w": array(4, 4)}, (array(2, 4),)) for s in range(3)])


def test_key_leaves_of_nnx():
    class Noisy(nnx.Module):
        def __init__(self, seed):
            self.rngs = nnx.Rngs(dropout=seed, params=seed)
            self.dense = nnx.Linear(4, 4, rngs=self.rngs)
            self.dropout = nnx.Dropout(0.5, rngs=self.rngs)

        def __call__(self, x):
            return self.dropout(self.dense(x))

    graph, _ = nnx.split(Noisy(0))

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    fused = check_fused([(apply, nnx.split(Noisy(seed))[1], (array(2, 4),)) for seed in range(3)])
    assert (fused.report.families, fused.report.superkernels) == (1, 1)


def test_abstract_keys():
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = coalesce.trace(lambda p, k: (jax.random.bits(k), jax.random.bits(p)), key, key)
    assert [v.aval for v in coalesce.fuse([program]).jaxpr.jaxpr.outvars] == [jax.typeof(jnp.zeros((), jnp.uint32))] * 2
