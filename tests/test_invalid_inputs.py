"""What a call refuses: the error names tenant and argument, nothing has run by then, and the next good call works."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import coalesce
from tests.alone import alone, array, fuse_tenants
from tests.compare import assert_same

X = array(2, 4)


def dense(w, x):
    return x @ w


KEY = jax.random.key(0)


def keyed(w, inputs, key, n, raw):
    return inputs["x"] @ w, jax.random.bits(key), n + 1, raw


GOOD = ({"x": X}, KEY, 3, jax.random.PRNGKey(1))


def replaced(i, value):
    return tuple(value if i == j else old for j, old in enumerate(GOOD))


BAD = {
    "tenants": ([GOOD], r"got inputs for 1 tenants, expected 2: one tuple for each of a, b"),
    "no tuple": ([GOOD, X], r"tenant 'b': inputs are .*, traced with "),
    "fewer inputs": ([GOOD, GOOD[:3]], r"tenant 'b': inputs are .*, traced with "),
    "pytree": ([replaced(0, {"y": X}), GOOD], r"tenant 'a': inputs are .*'y'.*, traced with .*'x'"),
    "shape": (
        [GOOD, replaced(0, {"x": X[:1]})],
        r"tenant 'b': input\[0\]\['x'\] is float32\[1, 4\], traced with float32\[2, 4\]; cast or pad it, or",
    ),
    "masked": (
        [GOOD, replaced(0, {"x": np.ma.masked_array(X, mask=X > 0)})],
        r"tenant 'b': input\[0\]\['x'\] is a MaskedArray, expected f32\[2,4\]",
    ),
    "rank": ([GOOD, replaced(0, {"x": X[0]})], r"tenant 'b': input\[0\]\['x'\] is float32\[4\], traced with"),
    "dtype": (
        [replaced(0, {"x": X.astype(jnp.bfloat16)}), GOOD],
        r"tenant 'a': input\[0\]\['x'\] is bfloat16\[2, 4\], traced with float32\[2, 4\]; cast",
    ),
    "text": ([GOOD, replaced(0, {"x": "text"})], r"tenant 'b': input\[0\]\['x'\] is a str, expected f32\[2,4\]"),
    "no values": (
        [GOOD, replaced(0, {"x": jax.ShapeDtypeStruct((2, 4), jnp.float32)})],
        r"tenant 'b': input\[0\]\['x'\] is a ShapeDtypeStruct, expected f32\[2,4\]",
    ),
    "key implementation": (
        [replaced(1, jax.random.key(0, impl="rbg")), GOOD],
        r"tenant 'a': input\[1\] is not a PRNG key of threefry2x32, as it was traced with",
    ),
    "raw key for a typed one": (
        [GOOD, replaced(1, jax.random.PRNGKey(0))],
        r"tenant 'b': input\[1\] is not a PRNG key",
    ),
    "typed key for a raw one": (
        [GOOD, replaced(3, KEY)],
        r"tenant 'b': input\[3\] is key<fry>\[\], traced with uint32\[2\]",
    ),
    "two typed keys for a raw one": (
        [GOOD, replaced(3, jax.random.split(KEY))],
        r"tenant 'b': input\[3\] is key<fry>\[2\], traced with uint32\[2\]",
    ),
    "more keys": ([GOOD, replaced(1, jax.random.split(KEY))], r"tenant 'b': input\[1\] is "),
    "number of another type": ([GOOD, replaced(2, 3.7)], r"tenant 'b': input\[2\] is "),
    "number out of range": ([GOOD, replaced(2, 2**40)], r"tenant 'b': input\[2\] is "),
}


@pytest.fixture(scope="module")
def fused():
    return coalesce.fuse([coalesce.trace(keyed, array(4, 4), *GOOD, name=name) for name in "ab"])


@pytest.mark.parametrize("name", BAD)
def test_inputs_that_were_not_traced(fused, name):
    inputs, text = BAD[name]
    with pytest.raises(coalesce.InvalidInput, match=text):
        fused(inputs)


def test_a_good_call_after_bad_ones():
    weights = [array(4, 4), array(4, 4)]
    fused = coalesce.fuse([coalesce.trace(dense, w, X, name=name) for w, name in zip(weights, "ab", strict=True)])
    for _ in range(2):
        with pytest.raises(coalesce.InvalidInput):
            fused([(X,), (X[:1],)])
        for w, result in zip(weights, fused([(X,), (X,)]), strict=True):
            assert_same(result, alone((dense, w, (X,))))


@pytest.mark.parametrize("place, text", [(0, r"\[0\]\['x'\]"), (1, r"\[1\]")])
def test_what_was_donated_is_told_with_tenant_and_input(fused, place, text):
    x, key = jnp.ones((2, 4)), jax.random.key(1)
    bad = [GOOD, replaced(place, ({"x": x}, key)[place])]
    x.delete()
    key.delete()
    gone = pytest.raises(coalesce.InvalidInput, match=rf"tenant 'b': input{text} was deleted \(donated\?\); give one")
    with gone:
        fused(bad)
    with gone:
        fused.staged().stage(bad)
    with gone:  # beside what is traced
        jax.jit(lambda x: fused([replaced(0, {"x": x}), bad[1]]))(X)


def test_inputs_of_arrays_alone_that_were_donated():
    fused = coalesce.fuse([coalesce.trace(dense, array(4, 4), X, name=name) for name in "ab"])
    staged, gone = fused.staged(), jnp.ones((2, 4))
    inputs = staged.stage([(X,), (X,)])
    gone.delete()
    with pytest.raises(coalesce.InvalidInput, match=r"tenant 'a': input\[0\] was deleted"):
        fused([(gone,), (X,)])
    staged(inputs)
    inputs[0][0].delete()
    with pytest.raises(coalesce.InvalidInput, match=r"family 0 \(a, b\), input 0 was deleted \(donated\?\); stage it"):
        staged(inputs)


def test_a_call_under_jit_vmap_and_grad_is_a_part_of_the_callers_program():
    w = array(4, 4)
    fused = coalesce.fuse([coalesce.trace(dense, w, X, name="a")])
    np.testing.assert_allclose(jax.jit(lambda x: fused([(x,)]))(X)[0], dense(w, X), rtol=1e-6)
    slope = jax.grad(lambda x: fused([(x,)])[0].sum())(X)
    np.testing.assert_allclose(slope, jax.grad(lambda x: dense(w, x).sum())(X), rtol=1e-6)


def test_a_call_without_jit_runs_step_by_step():
    def fn(w, x):
        x = lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=2)[0]
        x = lax.while_loop(lambda c: c.sum() < 3, lambda c: c + jnp.abs(c @ w) + 0.1, x)
        return lax.cond(w[0, 0] > 0, lambda c: c @ w, jnp.sin, x)

    tenants = [(fn, array(4, 4), (array(2, 4),)) for _ in range(2)]
    fused = fuse_tenants(tenants)
    requests = [xs for _, _, xs in tenants]
    with jax.disable_jit():
        results = fused(requests)
        staged = fused.staged()
        assert_same(staged.unstage(staged(staged.stage(requests))), results)
    assert_same(results, [alone(tenant) for tenant in tenants])


@pytest.mark.parametrize("kernel", ["indexed_gemm", "indexed_matvec", "mosaic_gemm"])
def test_a_kernel_without_a_derivative_says_so(kernel):
    w, x = array(64, 64, dtype=jnp.bfloat16), array(1, 64, dtype=jnp.bfloat16)
    program = coalesce.trace(dense, w, x, name="a")
    fused = coalesce.fuse([program], platform="gpu", choose_kernel=lambda op, groups, platform: kernel)
    with pytest.raises(coalesce.PlanError, match=r"has no derivative; .*fuse\(..., platform='cpu'\)"):
        jax.grad(lambda x: fused([(x,)])[0].sum())(x)
    slope = jax.grad(lambda x: coalesce.fuse([program], platform="cpu")([(x,)])[0].sum())(x)
    np.testing.assert_array_equal(slope, jax.grad(lambda x: dense(w, x).sum())(x))
