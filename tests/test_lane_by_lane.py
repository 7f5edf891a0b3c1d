"""What cannot run for all lanes at once runs lane by lane inside the fused program, and explain() says why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from tests.alone import alone, array, check_fused, fuse_tenants
from tests.compare import assert_same


def three(fn):
    return [(fn, array(4, 4), (array(2, 4),)) for _ in range(3)]


def reasons(fused):
    """The lines under `# run lane by lane`, without the places of the equations."""
    return [line.split(": ", 1)[1] for line in fused.explain().split("# run lane by lane")[1].splitlines()[1:]]


# ---- debug callbacks -----------------------------------------------------------------------------------------------


def test_a_debug_callback_runs_once_for_each_tenant_and_call():
    seen = []

    def apply(w, x):
        y = x @ w
        jax.debug.callback(lambda v: seen.append(float(v)), y.sum())
        return jnp.sin(y)

    tenants = three(apply)
    fused = fuse_tenants(tenants)
    assert seen == []
    for calls in (1, 2):
        fused([xs for _, _, xs in tenants])
        jax.effects_barrier()
        want = [float((x @ w).sum()) for _, w, (x,) in tenants] * calls
        np.testing.assert_allclose(sorted(seen), sorted(want), rtol=1e-4)
    assert fused.report.families == fused.report.superkernels == 1
    assert reasons(fused) == ["debug_callback: a debug callback runs once for each tenant"]


def test_debug_print(capfd):
    def apply(w, x):
        jax.debug.print("first is {x}", x=x[0, 0].astype(int))
        return x @ w

    tenants = [(apply, array(2, 2), (jnp.full((2, 2), float(i)),)) for i in range(3)]
    fuse_tenants(tenants)([xs for _, _, xs in tenants])
    jax.effects_barrier()
    assert sorted(capfd.readouterr().out.split("\n")) == ["", "first is 0", "first is 1", "first is 2"]


def test_a_debug_callback_of_one_tenant_leaves_the_others_alone():
    seen = []

    def loud(w, x):
        return (jax.debug.callback(lambda: seen.append(1)), x @ w)[1]

    def quiet(w, x):
        return x @ w

    tenants = [(fn, array(4, 4), (array(2, 4),)) for fn in (loud, quiet)]
    fused = fuse_tenants(tenants)
    fused([xs for _, _, xs in tenants])
    jax.effects_barrier()
    assert (len(seen), fused.report.families) == (1, 2)


def test_a_debug_callback_in_a_scan_runs_in_every_step():
    seen = []

    def apply(w, x):
        def step(carry, _):
            jax.debug.callback(lambda v: seen.append(float(v)), carry[0, 0])
            return jnp.sin(carry @ w), None

        return lax.scan(step, x, None, 4)[0]

    tenants = three(apply)
    fused = fuse_tenants(tenants)
    results = fused([xs for _, _, xs in tenants])
    jax.effects_barrier()
    assert len(seen) == 12
    assert fused.report.superkernels == 1
    for tenant, result in zip(tenants, results, strict=True):
        assert_same(result, alone(tenant))


# ---- callbacks that give values ------------------------------------------------------------------------------------


def on_host(x):
    return jax.pure_callback(lambda v: np.cumsum(v, dtype=v.dtype), jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_pure_callbacks():
    fused = check_fused(three(lambda w, x: on_host((x @ w).sum(0)) * 2))
    assert reasons(fused) == ["pure_callback: a callback on the host runs once for each tenant"]
    assert fused.report.superkernels == 1


def test_a_pure_callback_in_a_scan_and_a_cond():
    def in_scan(w, x):
        return lax.scan(lambda c, row: (on_host(jnp.sin(c + row)), c), jnp.zeros(4), x @ w)

    def in_cond(w, x):
        return lax.cond(x[0, 0] > 0, lambda: on_host((x @ w)[0]), lambda: x[0])

    for fn in (in_scan, in_cond):
        assert "callback" in "".join(reasons(check_fused(three(fn))))


def small_doubled(v):
    if (v >= 4).any():
        raise ValueError("nobody asked for that")
    return v * 2


def test_no_callback_is_called_with_what_its_own_program_would_not_call_it_with():
    """In a branch that a lane does not take, or after the end of its loop."""

    def double(v):
        return jax.pure_callback(small_doubled, jax.ShapeDtypeStruct(v.shape, v.dtype), v)

    def in_branch(w, x):
        return lax.cond(x[0] < 4, lambda v: double(v) @ w, lambda v: v @ w, x)

    def in_loop(w, x):
        return lax.while_loop(lambda v: v[0] < 4, lambda v: double(v), x) @ w

    for fn, why in ((in_branch, "a branch holds a callback"), (in_loop, "it holds a callback")):
        tenants = [(fn, array(3, 3), (jnp.full(3, value),)) for value in (1.0, 5.0, 3.0)]
        [line] = reasons(check_fused(tenants, pack_unbounded_loops=True))
        assert why in line


def test_scans_of_unequal_lengths_call_back_as_often_as_alone():
    calls = []

    def seen(v):
        calls.append(1)
        return v

    def scan_of(length):
        def fn(w, x):
            def step(c, _):
                c = jnp.tanh(c @ w)
                return jax.pure_callback(seen, jax.ShapeDtypeStruct(c.shape, c.dtype), c), None

            return lax.scan(step, x, None, length=length)[0]

        return fn

    tenants = [(scan_of(length), array(4, 4), (array(2, 4),)) for length in (2, 5)]
    fused = fuse_tenants(tenants, policy="always")
    jax.block_until_ready(fused([xs for _, _, xs in tenants]))
    assert len(calls) == 7


# ---- random bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["RNG_THREE_FRY", "RNG_PHILOX", "RNG_DEFAULT"])
def test_rng_bit_generator_gives_each_lane_its_own_bits(algorithm):
    def apply(_, key):
        return lax.rng_bit_generator(key, (3, 5), algorithm=getattr(lax.RandomAlgorithm, algorithm))

    tenants = [(apply, (), (jnp.arange(4, dtype=jnp.uint32) + seed,)) for seed in range(3)]
    fused = check_fused(tenants)
    assert reasons(fused) == ["rng_bit_generator: batching rng_bit_generator would give lanes other random bits"]


def test_random_bits_of_rbg_keys_give_the_reason():
    tenants = [(lambda _, k: jax.random.bits(k, (3,)), (), (jax.random.key(s, impl="rbg"),)) for s in range(3)]
    assert reasons(check_fused(tenants)) == [
        "random_bits: batching this key implementation would give lanes other random bits"
    ]


def test_random_bits_of_threefry_keys_run_at_once():
    tenants = [(lambda _, k: jax.random.bits(k, (3,)), (), (jax.random.key(s),)) for s in range(3)]
    assert reasons(check_fused(tenants)) == []


# ---- primitives that JAX cannot batch ------------------------------------------------------------------------------


def unbatchable(name):
    """A primitive as a user may define one: it computes sin, and has no batching rule."""
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda x: ShapedArray(x.shape, x.dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(jnp.sin, multiple_results=False))
    return primitive


@pytest.mark.parametrize("tenants", [1, 3])
def test_a_primitive_without_a_batching_rule(tenants):
    ours = unbatchable("ours")
    fused = check_fused(three(lambda w, x: ours.bind(x @ w) + 1)[:tenants])
    assert reasons(fused) == (["ours: ours has no batching rule"] if tenants > 1 else [])
    assert fused.report.superkernels == (tenants > 1)


def test_a_primitive_without_a_batching_rule_inside_a_loop():
    ours = unbatchable("ours")
    fused = check_fused(three(lambda w, x: lax.fori_loop(0, 3, lambda _, c: ours.bind(c @ w), x)))
    assert reasons(fused) == ["ours: ours has no batching rule"]


def test_a_rule_for_vmap_of_a_function_that_closes_over_arrays():
    """JAX refuses to batch these: an array is the same for all lanes, and a weight is not."""
    number = array()

    def shifted(by):
        own = jax.custom_batching.custom_vmap(lambda v: v + by)
        own.def_vmap(lambda size, batched, v: (v + by, True))
        return own

    fused = check_fused(three(lambda w, x: shifted(number)(x @ w)))
    assert reasons(fused) == [] and fused.report.superkernels == 1
    [line] = reasons(check_fused(three(lambda w, x: shifted(w[0, 0])(x @ w))))
    assert line.startswith("custom_vmap_call: the batching rule of custom_vmap_call refuses it: ")


def test_nothing_runs_lane_by_lane_where_no_operand_differs():
    """One lane-by-lane equation on shared values runs once."""
    ours = unbatchable("ours")
    constant = array(2, 4)
    fused = check_fused(three(lambda w, x: x @ w + jnp.arange(8.0).reshape(2, 4) + ours.bind(constant)))
    assert reasons(fused) == []


# ---- loops that one lane could keep from ending --------------------------------------------------------------------


def halve(w, x):
    """As many steps as the input needs."""
    return lax.while_loop(lambda c: jnp.abs(c).max() > 0.1, lambda c: jnp.tanh(c @ w) * c / 2, x)


def test_unbounded_loops_run_lane_by_lane_unless_asked_for():
    tenants = [(halve, array(4, 4), (array(2, 4) * scale,)) for scale in (0.01, 1, 30)]
    fused = check_fused(tenants)
    [line] = reasons(fused)
    assert "while: its trip count depends on the lane" in line and "pack_unbounded_loops" in line
    assert (fused.report.superkernels, fused.report.alone, fused.report.heavy_ops) == (0, 3, 3)
    packed = check_fused(tenants, pack_unbounded_loops=True)
    assert reasons(packed) == []
    assert (packed.report.superkernels, packed.report.alone) == (1, 0)


def test_a_branch_with_an_unbounded_loop_runs_lane_by_lane():
    def apply(w, x):
        return lax.cond(x[0, 0] > 0, lambda: halve(w, x), lambda: x)

    tenants = [(apply, array(4, 4), (jnp.full((2, 4), value),)) for value in (-1.0, 1.0, 5.0)]
    [line] = reasons(check_fused(tenants))
    assert "cond: a branch holds a while_loop" in line
