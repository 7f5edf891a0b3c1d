"""cse: equal equations are computed once; anything that could tell two apart keeps them apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import coalesce
from coalesce import jaxpr as J
from coalesce.passes.canonicalize import canonicalize
from coalesce.passes.cse import cse
from coalesce.passes.inline import inline
from tests.alone import array
from tests.rewrites import checked, equations, rewritten

X = array(3)


def names(program):
    return [eqn.primitive.name for eqn in equations(program)]


def test_equal_chains(golden):
    golden(rewritten(cse, lambda _, x: lax.exp(lax.sin(x)) * lax.exp(lax.sin(x)), (), X))


def test_equal_dots(golden):
    golden(rewritten(cse, lambda w, x: (lax.dot(x, w), lax.dot(x, w)), array(4, 3), array(2, 4)))


def test_in_the_body_of_a_scan(golden):
    def apply(_, x):
        return lax.scan(lambda c, row: (lax.sin(c) + lax.sin(c) * row, None), x, jnp.ones((4, 3)))[0]

    golden(rewritten(cse, apply, (), X))


def test_equal_loops_of_other_variables(golden):
    def loop(w, x):
        return lax.scan(lambda c, _: (lax.tanh(lax.dot(c, w)), None), x, None, 3)[0]

    golden(rewritten(cse, lambda w, x: loop(w, x) + loop(w, x), array(3, 3), X))


def test_a_value_and_itself_under_another_name_in_a_region(golden):
    def apply(_, i, x):
        one, other = lax.sin(x), lax.sin(x)
        return lax.cond(i > 0, lambda: one, lambda: lax.exp(other))

    golden(rewritten(cse, apply, (), 1, X))


APART = {
    "operands": lambda w, x: lax.sin(x) + lax.sin(w),
    "order of operands": lambda w, x: (x - w) * (w - x),
    "parameters": lambda w, x: (x.reshape(3, 1), x.reshape(1, 3)),
    "precision": lambda w, x: lax.dot(x, w) + lax.dot(x, w, precision="highest"),
    "accumulation": lambda w, x: (lax.dot(x, w), lax.dot(x, w, preferred_element_type=jnp.float32)),
    "literals": lambda w, x: (x * 2.0, x * 3.0),
    "zeros of either sign": lambda w, x: (x * 0.0, x * -0.0),
    "types of results": lambda w, x: (x.astype(jnp.float16), x.astype(jnp.bfloat16)),
}


@pytest.mark.parametrize("name", APART)
def test_kept_apart(name):
    program = coalesce.trace(APART[name], array(3), X)
    assert cse(program) is program


def test_a_number_that_is_broadcast_to_a_number_is_there_for_who_reads_it():
    """As other passes may leave it; JAX does not."""

    def apply(_, s, x):
        return x * lax.broadcast_in_dim(lax.neg(s), (3,), ())

    program = coalesce.trace(apply, (), np.float32(2), X)
    negated, broadcast, product = equations(program)
    own = broadcast.replace(invars=negated.invars, outvars=negated.outvars, params={**broadcast.params, "shape": ()})
    jaxpr = J.close(J.invars(program.jaxpr), [own, broadcast, product], J.outvars(program.jaxpr))
    checked(cse, program.with_jaxpr(jaxpr))


def test_callbacks_and_effects_are_kept_apart():
    def apply(_, x):
        for _ in range(2):
            jax.debug.callback(lambda v: None, x)
        return [jax.pure_callback(np.sin, jax.ShapeDtypeStruct((3,), jnp.float32), x) for _ in range(2)]

    program = inline(coalesce.trace(apply, (), X))
    assert names(cse(program)).count("pure_callback") == 2
    assert names(cse(program)).count("debug_callback") == 2


def test_random_bits_of_one_key_are_computed_once():
    def bits(_, k):
        return jax.random.bits(k, (3,)) + jax.random.bits(k, (3,))

    after = checked(cse, inline(coalesce.trace(bits, (), jax.random.PRNGKey(0))))
    assert names(after).count("random_bits") == 1


def test_precision_is_kept():
    def dots(w, x):
        return [lax.dot(x, w, precision="highest") for _ in range(2)]

    [eqn] = equations(checked(cse, coalesce.trace(dots, array(3, 3), array(2, 3))))
    assert eqn.params["precision"] == (lax.Precision.HIGHEST,) * 2


def test_a_program_without_equal_equations_is_left_alone():
    program = coalesce.trace(lambda w, x: lax.dot(x, w), array(3, 3), array(2, 3))
    assert cse(program) is program


def test_a_number_stands_before_each_of_its_readers():
    """However the tenant wrote it down: once for both, or once for each."""

    def once(w, x):
        half = jnp.full((2, 3), 0.5)
        return jnp.maximum(lax.dot(x, w), half) * jnp.minimum(lax.dot(x, w), half)

    def twice(w, x):
        return jnp.maximum(lax.dot(x, w), jnp.full((2, 3), 0.5)) * jnp.minimum(lax.dot(x, w), jnp.full((2, 3), 0.5))

    programs = [coalesce.trace(fn, array(4, 3), array(2, 4), name=fn.__name__) for fn in (once, twice)]
    for program in programs:
        found = cse(canonicalize(inline(program)))
        assert names(found) == ["dot_general", "broadcast_in_dim", "max", "broadcast_in_dim", "min", "mul"]
        assert cse(found) is found
    assert len(coalesce.fuse(programs).bundle.families) == 1


def test_equal_numbers_that_are_results_are_one():
    def apply(w, x):
        return jnp.full((2,), 0.5), jnp.full((2,), 0.5), jnp.full((2,), 0.5) * x

    found = cse(inline(coalesce.trace(apply, (), array(2), name="a")))
    first, second, _ = found.jaxpr.jaxpr.outvars
    assert first is second and cse(found) is found
