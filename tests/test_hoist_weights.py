"""hoist_weights: what depends on weights alone is prepared once; what is cheaper to compute than to keep stays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import coalesce
from coalesce.passes.canonicalize import canonicalize
from coalesce.passes.dce import dce
from coalesce.passes.hoist_weights import hoist_weights
from coalesce.passes.inline import inline
from tests.alone import array
from tests.rewrites import checked, equations, rewritten

BF16 = jnp.bfloat16


def shown(fn, params, *inputs):
    return rewritten(hoist_weights, fn, params, *inputs, first=(inline, dce))


def hoisted(fn, params, *inputs):
    return checked(hoist_weights, dce(inline(coalesce.trace(fn, params, *inputs))))


def prepared(program):
    """The primitives that run once a tenant."""
    return [eqn.primitive.name for eqn in program.prepare.jaxpr.eqns]


def remaining(program):
    return [eqn.primitive.name for eqn in program.jaxpr.jaxpr.eqns]


# ---- what moves ----------------------------------------------------------------------------------------------------


def test_batch_norm(golden):
    """Scale and offset are prepared, with their unit dimensions; the broadcasts stay."""

    def apply(p, x):
        scale = lax.rsqrt(p["var"] + 1e-5) * p["scale"]

        def wide(v):
            return lax.broadcast_in_dim(v, x.shape, (1,))

        return (x - wide(p["mean"])) * wide(scale) + wide(p["bias"])

    params = {name: abs(array(3)) for name in ("bias", "mean", "scale", "var")}
    golden(shown(apply, params, array(9, 3)))


def test_transposes_and_casts(golden):
    """A cast to fewer bytes moves; a cast to more moves only if a heavy op reads it."""

    def apply(p, x):
        narrow = lax.convert_element_type(p["f32"], BF16)
        wide = lax.convert_element_type(p["bf16"], jnp.float32)
        return lax.dot(x, lax.transpose(wide, (1, 0))), wide * 2.0, narrow

    golden(shown(apply, {"f32": array(3), "bf16": array(3, 4, dtype=BF16)}, array(2, 4)))


def test_weights_stand_in_the_order_of_their_first_use(golden):
    """Whatever the order of params; one that nobody reads is dropped from the program, not from `prepare`."""

    def apply(p, x):
        return lax.dot(lax.dot(x, lax.neg(p["c"])), p["a"]) * lax.exp(p["b"])

    golden(shown(apply, {"a": array(4, 4), "b": array(2, 4), "c": array(4, 4), "d": array(9)}, array(2, 4)))


def test_outputs_that_depend_on_weights_alone(golden):
    golden(shown(lambda w, x: (lax.sin(w), x, w), array(3), array(3)))


# ---- what stays ----------------------------------------------------------------------------------------------------


def test_broadcasts_that_a_heavy_op_reads_move(golden):
    def apply(p, x):
        return lax.dot(x, lax.broadcast_in_dim(p["row"], (4, 3), (1,))), x * lax.broadcast_in_dim(p["b"], (2, 4), (1,))

    golden(shown(apply, {"row": array(3), "b": array(4)}, array(2, 4)))


def test_constants(golden):
    """An iota that prepared work reads is computed there too, and stays where the program reads it."""

    def apply(w, x):
        ramp = lax.iota(jnp.float32, 3)
        return x * (w + ramp), x + ramp

    golden(shown(apply, array(3), array(3)))


STAY = {
    "a broadcast": (lambda w, x: lax.broadcast_in_dim(w, (2, 3), (1,)) * x, array(3), "broadcast_in_dim"),
    "a widening cast": (lambda w, x: w.astype(jnp.float32) * x, array(2, 3, dtype=BF16), "convert_element_type"),
    "padding": (lambda w, x: lax.pad(w, 0.0, ((0, 1, 0), (0, 0, 0))), array(2, 3), "pad"),
    "an outer product": (lambda w, x: w[:, None] * w[None], array(3), "mul"),
    "a value of no weight": (lambda w, x: x * lax.iota(jnp.float32, 6).reshape(2, 3), array(3), "iota"),
}


@pytest.mark.parametrize("name", STAY)
def test_stays(name):
    fn, w, primitive = STAY[name]
    after = hoisted(fn, w, array(2, 3))
    assert primitive in remaining(after) and primitive not in prepared(after)


def test_callbacks_and_keys_stay():
    struct = jax.ShapeDtypeStruct((3,), jnp.float32)

    def apply(p, x):
        bits = jax.random.bits(p["key"], (3,))
        jax.debug.callback(lambda v: None, p["w"])
        return x * jax.pure_callback(np.sin, struct, p["w"]), bits

    program = inline(coalesce.trace(apply, {"w": array(3), "key": jax.random.key(0)}, array(3)))
    after = hoist_weights(program)
    assert prepared(after) == []
    assert {"debug_callback", "pure_callback", "random_bits"} <= set(remaining(after))
    assert hoist_weights(after) is after


def test_small_results_of_large_intermediates_move():
    """A chain is judged by what comes out of it: an outer product that is summed at once costs no memory to keep."""
    after = hoisted(lambda w, x: x * (w[:, None] * w[None]).sum(0), array(3), array(3))
    assert remaining(after) == ["mul"]


# ---- loops and branches --------------------------------------------------------------------------------------------


def test_work_in_the_body_of_a_scan(golden):
    def apply(w, x):
        def step(c, row):
            return (lax.tanh(lax.dot(c, lax.transpose(w["h"], (1, 0))) + row * lax.exp(w["b"])), c)

        return lax.scan(step, jnp.zeros(4), x)

    golden(shown(apply, {"b": array(4), "h": array(4, 4)}, array(3, 4)))


def test_work_in_a_loop_in_a_loop(golden):
    def apply(w, x):
        def inner(c, _):
            return (lax.dot(c, lax.neg(w)), None)

        def outer(c, _):
            return (lax.scan(inner, c, None, 2)[0], None)

        return lax.scan(outer, x, None, 3)[0]

    golden(shown(apply, array(4, 4), array(4)))


def test_work_in_a_while_loop(golden):
    def apply(w, x):
        return lax.while_loop(
            lambda c: lax.lt(c[0], lax.exp(w["stop"])), lambda c: (c[0] + 1.0, lax.dot(c[1], lax.neg(w["w"]))), (0.0, x)
        )[1]

    golden(shown(apply, {"stop": jnp.float32(1), "w": array(4, 4)}, array(4)))


def test_work_in_branches(golden):
    def apply(w, i, x):
        return lax.cond(i > 0, lambda: lax.dot(x, lax.neg(w)), lambda: x * lax.sin(w)[0])

    golden(shown(apply, array(4, 4), 1, array(4)))


def test_weights_that_a_loop_changes_stay_in_it():
    def apply(w, x):
        return lax.scan(lambda c, row: (lax.neg(c), lax.dot(row, lax.exp(c))), w, x)[1]

    after = hoisted(apply, array(4, 4), array(3, 4))
    assert prepared(after) == []
    assert hoist_weights(after) is after


def test_a_whole_loop_over_weights_alone_moves():
    def apply(w, x):
        power = lax.fori_loop(0, 3, lambda _, c: lax.dot(c, w), w)
        return lax.dot(x, power)

    assert remaining(hoisted(apply, array(4, 4), array(2, 4))) == ["dot_general"]


# ---- what every move keeps -----------------------------------------------------------------------------------------


def test_precision_and_accumulation_type_are_kept():
    how: dict[str, Any] = dict(precision="highest", preferred_element_type=jnp.float32)

    def apply(p, x):
        return lax.dot(x, lax.dot(p["a"], p["b"], **how).astype(BF16), **how)

    after = hoisted(apply, {"a": array(4, 2, dtype=BF16), "b": array(2, 3, dtype=BF16)}, array(2, 4, dtype=BF16))
    dots = [eqn for eqn in equations(after) if eqn.primitive.name == "dot_general"]
    assert len(dots) == 2
    for eqn in dots:
        assert eqn.params["precision"] == (lax.Precision.HIGHEST,) * 2
        assert eqn.params["preferred_element_type"] == jnp.float32


def test_canonical_weights_on_the_left_are_prepared_in_their_layout():
    """Together with canonicalize: the transpose of the weights runs once."""
    program = canonicalize(coalesce.trace(lambda w, x: lax.dot(w, x), array(3, 4), array(4, 2)))
    after = checked(hoist_weights, program)
    assert prepared(after) == ["transpose"]
    assert remaining(after) == ["transpose", "dot_general", "transpose"]


def test_a_program_of_prepared_weights_is_left_alone():
    program = hoist_weights(coalesce.trace(lambda w, x: lax.dot(x, w), array(3, 3), array(2, 3)))
    assert prepared(program) == []
    assert hoist_weights(program) is program
