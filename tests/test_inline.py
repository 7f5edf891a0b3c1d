"""inline: calls give way to what they call."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import coalesce
from coalesce import jaxpr as J
from coalesce.passes.inline import inline
from tests.alone import array
from tests.rewrites import checked, equations, rewritten

X = array(3)


def calls(program):
    return [eqn.primitive.name for eqn in equations(program) if J.callee(eqn) is not None]


def test_a_custom_derivative(golden):
    @jax.custom_jvp
    def relu(x):
        return lax.max(x, 0.0)

    relu.defjvp(lambda primals, tangents: (relu(*primals), tangents[0]))
    golden(rewritten(inline, lambda _, x: relu(x), (), X))


def test_one_function_called_twice(golden):
    """Both calls hold the same variables; the flat program binds each once."""
    twice = jax.jit(lambda x: lax.sin(x) * 2)
    golden(rewritten(inline, lambda _, x: twice(twice(x)), (), X))


def test_calls_in_calls(golden):
    inner = jax.jit(lambda w, x: lax.dot(x, w))
    outer = jax.jit(lambda w, x: (lax.cos(inner(w, x)), x, 7.0))
    golden(rewritten(inline, lambda w, x: outer(w, lax.neg(x)), array(3, 3), array(2, 3)))


def test_calls_in_the_body_of_a_scan(golden):
    step = jax.jit(lambda c, x: (lax.tanh(c + x), c))
    golden(rewritten(inline, lambda _, x: lax.scan(step, x, jnp.ones((4, 3))), (), X))


def test_calls_in_branches(golden):
    sine = jax.jit(lax.sin)
    golden(rewritten(inline, lambda _, i, x: lax.switch(i, [sine, lambda x: x, lambda x: sine(sine(x))], x), (), 1, X))


def test_a_loop_whose_rows_end_by_themselves(golden):
    step = jax.jit(lambda v: v * 2)
    apply = jax.vmap(lambda r: lax.while_loop(lambda v: jnp.max(v) < 8, step, r))
    golden(rewritten(inline, lambda _, x: apply(x), (), array(2, 3)))


def test_every_kind_of_call_goes():
    @jax.custom_vjp
    def doubled(x):
        return x * 2

    doubled.defvjp(lambda x: (x * 2, None), lambda _, g: (g * 2,))

    def apply(w, x):
        x = jax.nn.relu(jax.nn.silu(x))
        x = jax.checkpoint(lambda v: doubled(v) @ w)(x)
        x = jax.remat(jnp.tanh)(jnp.linalg.norm(x, axis=0))
        return lax.while_loop(lambda v: jnp.all(jax.jit(jnp.abs)(v) > 1), jax.jit(lambda v: v / 2), x)

    before = coalesce.trace(apply, array(3, 3), array(2, 3))
    after = checked(inline, before)
    assert len(calls(before)) > 6
    assert calls(after) == []


def test_arrays_that_a_call_closes_over():
    table = np.arange(3, dtype=np.float32)

    def apply(_, x):
        return jax.jit(lambda v: v + table)(x) + jax.jit(lambda v: v * table)(x)

    assert calls(checked(inline, coalesce.trace(apply, (), X))) == []


def test_a_flat_program_is_left_alone():
    program = coalesce.trace(lambda w, x: lax.dot(x, w), array(3, 3), array(2, 3))
    assert inline(program) is program


def test_the_callers_name_stack_stands_first():
    @jax.jit
    def inner(x):
        with jax.named_scope("deep"):
            return lax.sin(x)

    def apply(_, x):
        with jax.named_scope("layer"):
            return inner(x)

    after = inline(coalesce.trace(apply, (), X))
    [eqn] = equations(after)
    stack = str(eqn.source_info.name_stack)
    assert stack.startswith("layer/") and stack.endswith("deep")


def test_precision_and_accumulation_type_are_kept():
    dot = jax.jit(lambda w, x: lax.dot(x, w, precision="highest", preferred_element_type=jnp.float32))

    def bf16(*shape):
        return array(*shape, dtype=jnp.bfloat16)

    [eqn] = equations(checked(inline, coalesce.trace(dot, bf16(3, 3), bf16(2, 3))))
    assert eqn.params["precision"] == (lax.Precision.HIGHEST,) * 2
    assert eqn.params["preferred_element_type"] == jnp.float32
