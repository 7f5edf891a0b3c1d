"""dce: what nobody reads goes; effects and signatures stay."""

import jax
import jax.numpy as jnp
from jax import lax

import coalesce
from coalesce.passes.dce import dce
from coalesce.passes.hoist_weights import hoist_weights
from coalesce.passes.inline import inline
from tests.alone import array
from tests.rewrites import checked, equations, rewritten

X = array(3)


def test_a_chain(golden):
    def apply(w, x):
        lax.exp(lax.sin(lax.dot(x, w)))
        return lax.dot(lax.neg(x), w)

    golden(rewritten(dce, apply, array(4, 3), array(2, 4)))


def test_weights_that_nobody_reads_stay_in_the_signature(golden):
    golden(rewritten(dce, lambda p, x: (lax.sin(p["b"]), lax.cos(x))[1], {"a": array(2), "b": array(4)}, X))


def test_results_of_a_scan(golden):
    """A carry and a stacked result that nobody reads leave the loop."""

    def apply(w, x):
        def step(carry, row):
            used, unused = carry
            return (lax.tanh(lax.dot(used, w)), lax.exp(unused)), (lax.sin(row), lax.cos(row))

        (used, _), (sines, _) = lax.scan(step, (x, x), jnp.ones((4, 2)))
        return used, sines

    golden(rewritten(dce, apply, array(3, 3), X))


def test_results_of_branches(golden):
    def apply(i, x):
        return lax.cond(i > 0, lambda: (lax.sin(x), lax.exp(x)), lambda: (x, lax.cos(x)))[0]

    golden(rewritten(dce, lambda _, i, x: apply(i, x), (), 1, X))


def test_the_carry_of_a_while_loop_that_its_predicate_reads_stays(golden):
    def apply(_, x):
        lax.exp(x)
        return lax.while_loop(lambda carry: carry[0] < 3, lambda carry: (carry[0] + 1, lax.sin(carry[1])), (0, x))[1]

    golden(rewritten(dce, apply, (), X))


def test_what_prepares_weights_that_nobody_reads():
    """The program's own weights stay; what is prepared and not read is hoist_weights' to drop."""
    before = hoist_weights(coalesce.trace(lambda p, x: x * lax.rsqrt(p), abs(array(3)), X))
    assert dce(before) is before


def test_effects_stay():
    def apply(_, x):
        jax.debug.callback(lambda v: None, lax.sin(x))
        lax.cos(x)
        return x

    after = dce(inline(coalesce.trace(apply, (), X)))
    assert [eqn.primitive.name for eqn in equations(after)] == ["sin", "debug_callback"]
    assert dce(after) is after


def test_a_callback_without_effect_goes_with_its_result():
    struct = jax.ShapeDtypeStruct((3,), jnp.float32)
    after = checked(dce, coalesce.trace(lambda _, x: [x, jax.pure_callback(lambda v: v, struct, x)][0], (), X))
    assert equations(after) == []


def test_a_program_without_dead_code_is_left_alone():
    program = coalesce.trace(lambda w, x: lax.dot(x, w), array(3, 3), array(2, 3))
    assert dce(program) is program
