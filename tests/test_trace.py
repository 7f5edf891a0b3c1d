"""What `trace` accepts: every kind of input, output and parameter of a JAX function, and what becomes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import coalesce
from tests.alone import alone, array, check_fused, fuse_tenants
from tests.compare import assert_same


def three(fn, params, inputs):
    """Three tenants of one function; `params` and `inputs` are thunks, so that each gets values of its own."""
    return [(fn, params(), inputs()) for _ in range(3)]


def weights():
    return array(4, 4)


def inputs():
    return (array(2, 4),)


# ---- pytrees -------------------------------------------------------------------------------------------------------


def test_nested_pytrees_in_and_out():
    def apply(params, batch, extra):
        hidden = batch["x"] @ params["layers"][0]["w"] + params["layers"][0]["b"][None]
        return {"hidden": hidden, "more": (hidden * extra[0], [extra[1], None]), "empty": {}}

    fused = check_fused(
        three(
            apply,
            lambda: {"layers": [{"w": array(4, 3), "b": array(3)}], "none": None},
            lambda: ({"x": array(2, 4), "unused": array(1)}, (array(2, 3), array(5))),
        )
    )
    assert fused.report.families == 1


def test_outputs_that_are_inputs_weights_or_constants():
    constant = np.arange(3, dtype=np.int32)

    def apply(w, x, unused):
        return x, w, constant, 7, 2.5, True, x, jnp.zeros(2), unused

    check_fused(three(apply, weights, lambda: (array(2, 4), array(2))))


def test_a_derivative_by_an_integer():
    """JAX has a type for it, of which all values are one."""

    def apply(w, x):
        return jax.grad(lambda n: (x @ w).sum() * n.astype(x.dtype), allow_int=True)(jnp.int32(3)), x @ w

    w, x = array(4, 4), array(2, 4)
    fused = coalesce.fuse([coalesce.trace(apply, w, x, name="a")])
    assert "-> float0, %" in fused.explain()
    nothing, product = fused([(x,)])[0]
    assert nothing.dtype == jax.dtypes.float0
    assert_same(product, jax.jit(apply)(w, x)[1])


def test_no_inputs_and_no_params():
    check_fused(three(lambda w: jnp.sin(w), weights, tuple))
    check_fused(three(lambda _, x: jnp.sin(x), dict, inputs))
    check_fused(three(lambda _: jnp.arange(3), tuple, tuple))


def test_arrays_without_elements_and_without_dimensions():
    check_fused(three(lambda w, x: (x @ w, x.sum(), x.size), lambda: array(4, 0), inputs))
    check_fused(three(lambda w, x: w * x, lambda: array(), lambda: (array(),)))


# ---- dtypes --------------------------------------------------------------------------------------------------------


def test_integers_bools_and_bfloat16():
    def apply(params, tokens, mask, x):
        rows = jnp.where(mask[:, None], params["table"][tokens], 0)
        return rows + x, tokens + params["offset"], ~mask, (tokens > 2) | mask

    fused = check_fused(
        three(
            apply,
            lambda: {"table": array(9, 4, dtype=jnp.bfloat16), "offset": jnp.int8(3)},
            lambda: (jnp.array([1, 8, 3], jnp.int8), jnp.array([True, False, True]), array(3, 4, dtype=jnp.bfloat16)),
        )
    )
    assert fused.report.families == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8", "int16", "uint32", "complex64", "float8_e4m3fn"])
def test_every_dtype_passes(dtype):
    check_fused(
        three(lambda w, x: (lax.neg(w), jnp.stack([x, w])), lambda: jnp.ones(3, dtype), lambda: (jnp.ones(3, dtype),))
    )


def test_python_scalars():
    def apply(params, x, scale, flag):
        return x @ params["w"] * scale + params["bias"], scale * 2, jnp.where(flag, x, -x)

    tenants = three(apply, lambda: {"w": array(4, 4), "bias": 0.5}, lambda: (array(2, 4), 3, True))
    fused = check_fused(tenants)
    results = fused([(x, 4, False) for _, _, (x, _, _) in tenants])
    assert_same(results[1], jax.jit(apply)(tenants[1][1], tenants[1][2][0], 4, False))


def test_numpy_params_and_inputs():
    fused = check_fused(three(lambda w, x: x @ w, lambda: np.asarray(array(4, 4)), inputs))
    results = fused([(np.ones((2, 4), np.float32),)] * 3)
    assert all(isinstance(r, jax.Array) for r in results)


def test_64_bit_numpy_arrays_become_32_bit_as_under_jit():
    check_fused(three(lambda w, x: (x * w, w), lambda: np.arange(4), lambda: (np.arange(4),)))
    check_fused(three(lambda w, x: (x * w, w), lambda: np.arange(4.0), lambda: (np.arange(4.0),)))


# ---- params --------------------------------------------------------------------------------------------------------


def test_closed_over_arrays_and_unused_params():
    table = np.asarray(array(3, 4))
    device = array(3, 4)

    def apply(p, x):
        return (x @ p["w"] + table) * device

    program = coalesce.trace(apply, {"w": array(4, 4), "unused": array(7)}, array(3, 4))
    assert sorted((leaf.path, leaf.constant) for leaf in program.leaves) == [
        ("['unused']", False), ("['w']", False), ("constant 0", True), ("constant 1", True)]  # fmt: skip
    check_fused(three(apply, lambda: {"w": array(4, 4), "unused": array(7)}, lambda: (array(3, 4),)))


def test_arrays_on_a_mesh():
    """Params, what is closed over and inputs; the type of a value that is computed from them names the mesh."""
    mesh = NamedSharding(jax.make_mesh((1,), ("d",)), PartitionSpec())
    (w, x), biases = ([array(4, 4), array(2, 4)], [array(1, 4), array(1, 4)])

    def tenant(bias, place):
        bias = place(bias)
        return (lambda w, x: x @ w + bias), place(w), (place(x),)

    there = [tenant(bias, lambda v: jax.device_put(v, mesh)) for bias in biases]
    fused = fuse_tenants(there)
    for result, bias in zip(fused([xs for _, _, xs in there]), biases, strict=True):
        assert_same(result, alone(tenant(bias, lambda v: v)))


def test_leaves_that_are_no_arrays_are_closed_over():
    def apply(p, x):
        return p["act"](x @ p["w"]) if p["mode"] == "on" else x

    fused = check_fused(
        [(apply, {"act": act, "mode": "on", "w": array(4, 4)}, inputs()) for act in (jnp.tanh, jnp.tanh, jnp.sin)]
    )
    assert fused.report.families == 2


def test_abstract_params():
    """Everything that reads no weight works; a call says what is missing."""

    def apply(p, x):
        return jnp.tanh(x @ p["w"] * jnp.sqrt(p["s"]))

    params = {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32), "s": jax.ShapeDtypeStruct((1, 4), jnp.float32)}
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    programs = [coalesce.trace(apply, params, x, name=name) for name in "ab"]
    concrete = coalesce.trace(apply, {"w": array(4, 4), "s": array(1, 4)}, x, name="c")
    fused = coalesce.fuse([*programs, concrete])
    assert fused.report.superkernels == 1
    assert "pack 0 x3" in fused.explain()
    assert [v.aval for v in fused.jaxpr.jaxpr.outvars] == [jax.typeof(array(2, 4))] * 3
    assert fused.compile().cost_analysis() is not None
    with pytest.raises(coalesce.TraceError, match="tenant 'a' was traced from ShapeDtypeStructs"):
        fused([(array(2, 4),)] * 3)


def test_tenants_with_one_function_share_its_trace():
    runs = []

    def apply(w, x):
        runs.append(1)
        return x @ w

    programs = [coalesce.trace(apply, array(4, 4), array(2, 4), name=name) for name in "abc"]
    assert len(runs) == 1
    assert programs[0].jaxpr is programs[1].jaxpr is programs[2].jaxpr
    coalesce.trace(apply, array(4, 4), array(3, 4))
    assert len(runs) == 2


def test_trace_reads_no_array():
    """A deleted array has a shape and no bytes."""
    w, x = array(4, 4), array(2, 4)
    w.delete()
    x.delete()
    assert str(coalesce.trace(lambda w, x: x @ w, w, x, name="a")).startswith("a(%0:f32[4,4] | %1:f32[2,4])")
