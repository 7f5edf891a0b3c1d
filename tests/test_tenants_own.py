"""What a tenant brings with it stays: its scopes, precision and types, loops that may not run, its own kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

import coalesce
from coalesce import jaxpr as J
from tests.alone import array, check_fused
from tests.hlo import moves_of_size


def test_scanned_weights_are_not_copied():
    """A scan over layers: its weights are read step by step, behind the axis of the lanes."""

    def layers(w, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), h.sum()), x, w, reverse=True)

    fused = check_fused([(layers, array(6, 64, 64), (array(1, 64),)) for _ in range(3)])
    assert moves_of_size(fused.as_text(), 3 * 6 * 64 * 64) == []


def test_an_array_closed_over_by_an_inner_jit_is_a_weight():
    def tenant(b):
        inner = jax.jit(lambda w, x: jnp.tanh(x @ w) @ b)
        return inner, array(4, 4), (array(1, 4),)

    fused = check_fused([tenant(array(4, 4)) for _ in range(3)])
    assert (fused.report.families, fused.report.superkernels) == (1, 2)


def test_a_loop_of_an_untaken_branch_does_not_run():
    """It would never end: that it depends on weights alone does not move it out of the branch."""

    def fn(w, x):
        endless = lambda: x * lax.while_loop(lambda c: c > 0, lambda c: c * 1.0, w.sum())  # noqa: E731
        return lax.cond(x.sum() > 0, lambda: x * 2, endless)

    fused = coalesce.fuse([coalesce.trace(fn, jnp.ones(3), jnp.ones(3), name=name) for name in "ab"])
    np.testing.assert_array_equal(fused([(jnp.ones(3),)] * 2)[1], 2 * np.ones(3))


def test_a_loop_inside_an_opaque_equation_runs_lane_by_lane():
    def solve(w, x):
        def relax(_, b):
            return lax.while_loop(lambda c: jnp.abs(c).sum() > 1e-3, lambda c: c * w, b)

        return lax.custom_linear_solve(lambda v: v * w, x, relax)

    fused = coalesce.fuse([coalesce.trace(solve, jnp.full(3, 0.5), jnp.ones(3), name=name) for name in "ab"])
    assert "custom_linear_solve: it holds a while_loop" in fused.explain()


def test_a_tenant_with_a_pallas_kernel():
    def double(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2

    def fn(w, x):
        y = x @ w
        return pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype), interpret=True)(y)

    check_fused([(fn, array(4, 4), (array(2, 4),)) for _ in range(3)])


def test_a_batching_rule_that_refuses_the_case():
    def experts(w, x):
        return lax.ragged_dot(x, jnp.stack([w, w.T]), jnp.array([1, 1]))

    fused = check_fused([(experts, array(4, 4), (array(2, 4),)) for _ in range(3)])
    assert "the batching rule of ragged_dot_general refuses it" in fused.explain()


def test_named_scopes_reach_the_compiler():
    def fn(w, x):
        with jax.named_scope("my_layer"):
            return jnp.tanh(x @ w)

    fused = coalesce.fuse([coalesce.trace(fn, array(4, 4), array(1, 4), name=name) for name in "ab"])
    assert "my_layer" in fused.lower().as_text(debug_info=True)


def test_precision_is_what_it_was_when_traced():
    traced = coalesce.trace(lambda w, x: w.T @ x, array(4, 4), array(4), name="a")
    with jax.default_matmul_precision("highest"):
        jaxpr = coalesce.fuse([traced]).jaxpr
    assert [eqn.params["precision"] for eqn in J.walk(jaxpr) if eqn.primitive.name == "dot_general"] == [None]


def test_64_bit_types_need_their_option():
    with jax.enable_x64(True):
        program = coalesce.trace(lambda w, x: x @ w, np.ones((4, 4)), np.ones((2, 4)), name="wide")
    with pytest.raises(coalesce.PlanError, match="tenant 'wide' was traced with jax_enable_x64"):
        coalesce.fuse([program])
    with jax.enable_x64(True):
        fused = coalesce.fuse([program])
        fused.compile()
    with pytest.raises(coalesce.InvalidInput, match="tenant 'wide' was traced with jax_enable_x64"):
        fused([(np.ones((2, 4)),)])


def test_traced_weights_are_named():
    def inside(w):
        return coalesce.fuse([coalesce.trace(lambda p, x: x @ p["w"], {"w": w}, array(1, 4), name="in")])

    with pytest.raises(coalesce.PlanError, match=r"tenant 'in': params\['w'\] is a traced value, as inside jax.jit"):
        jax.jit(inside)(array(4, 4))


def test_64_bit_weights_need_it_in_every_call():
    """Also where the tenant alone widens them, and nothing that it takes or gives says so."""

    def fn(w, x):
        return (x.astype("float64") @ w.astype("float64")).astype("float32")

    x = array(2, 4)
    with jax.enable_x64(True):
        program = coalesce.trace(fn, array(4, 4), x, name="wide")
        fused = coalesce.fuse([program])
        staged = fused.staged()
        stacks = staged.stage([(x,)])
    with pytest.raises(coalesce.PlanError, match=r"tenant 'wide' widens weights to f64\[4,4\], .*x64; fuse"):
        coalesce.fuse([program])
    calls = lambda: fused([(x,)]), lambda: staged(stacks), lambda: staged.stage([(x,)])
    for call in (*calls, fused.compile, staged.compile):
        with pytest.raises(coalesce.InvalidInput, match=r"tenant 'wide' widens weights to f64\[4,4\], .*x64; call"):
            call()


def test_functions_that_take_64_bits_by_themselves():
    """That is theirs, unless a loop is rebuilt, or a product is run by a kernel, for all lanes."""

    def widened(work):
        def fn(w, x):
            with jax.enable_x64(True):
                return work(x.astype("float64")).astype("float32") * w

        return fn

    def loop(wide):
        return lax.scan(lambda c, _: (jnp.sin(c), None), wide, None, length=2)[0]

    check_fused([(widened(jnp.cumsum), array(4), (array(4),)) for _ in range(2)])
    x, why = array(4), r"tenant 'wide' has f64\[4\] in a loop, a branch or a product, which takes jax_enable_x64; "
    for work in (loop, lambda wide: wide @ wide):
        program = coalesce.trace(widened(work), array(4), x, name="wide")
        with pytest.raises(coalesce.PlanError, match=f"{why}fuse and call"):
            coalesce.fuse([program])
        with jax.enable_x64(True):
            fused = coalesce.fuse([program])
        with pytest.raises(coalesce.InvalidInput, match=f"{why}call"):
            fused([(x,)])


def test_deleted_weights_are_named():
    w = array(4, 4)
    program = coalesce.trace(lambda p, x: x @ p["w"], {"w": w}, array(1, 4), name="gone")
    w.delete()
    with pytest.raises(coalesce.PlanError, match=r"tenant 'gone': params\['w'\] was deleted"):
        coalesce.fuse([program])
