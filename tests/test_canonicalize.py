"""canonicalize: one spelling per operation. The goldens are small enough to check by hand."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import coalesce
from coalesce.heavy import heavy_eqns
from coalesce.passes.canonicalize import canonicalize
from coalesce.passes.dce import dce
from coalesce.passes.inline import inline
from tests.alone import array
from tests.rewrites import checked, equations, rewritten


def shown(fn, params, *inputs):
    return rewritten(canonicalize, fn, params, *inputs, first=(inline, dce))


def canonical(fn, params, *inputs):
    program = dce(inline(coalesce.trace(fn, params, *inputs, name="a")))
    return checked(canonicalize, program)


def heavy(program):
    [eqn] = heavy_eqns(program.jaxpr)
    return eqn


# ---- convolutions --------------------------------------------------------------------------------------------------

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


def conv(w, x, strides: Any = (1, 1), padding: Any = "VALID", layout=NHWC, **params):
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout, **params)


def test_1x1_conv(golden):
    golden(shown(conv, array(1, 1, 8, 4), array(2, 6, 6, 8)))


def test_1x1_conv_with_a_stride(golden):
    golden(shown(partial(conv, strides=(2, 3)), array(1, 1, 8, 4), array(2, 6, 6, 8)))


def test_1x1_conv_with_padding(golden):
    golden(shown(partial(conv, strides=(2, 2), padding=((1, 0), (0, 2))), array(1, 1, 8, 4), array(2, 6, 6, 8)))


def test_1x1_conv_with_negative_padding(golden):
    golden(shown(partial(conv, padding=((-1, 0), (-1, -2))), array(1, 1, 8, 4), array(2, 6, 6, 8)))


def test_patch_embedding(golden):
    golden(shown(partial(conv, strides=(4, 2)), array(4, 2, 3, 5), array(2, 9, 6, 3)))


def test_conv_over_the_whole_image(golden):
    golden(shown(conv, array(4, 5, 3, 6), array(2, 4, 5, 3)))


def test_channels_first(golden):
    golden(shown(partial(conv, padding="SAME", layout=NCHW), array(4, 3, 3, 3), array(2, 3, 8, 8)))


def test_channels_first_1x1(golden):
    golden(shown(partial(conv, layout=NCHW), array(4, 3, 1, 1), array(2, 3, 8, 8)))


def test_1d_and_3d(golden):
    def apply(p, x, y):
        one = conv(p[0], x, (1,), "SAME", ("NWC", "WIO", "NWC"))
        return one, conv(p[1], y, (1, 1, 1), "SAME", ("NCDHW", "OIDHW", "NCDHW"))

    golden(shown(apply, [array(3, 2, 4), array(4, 2, 3, 3, 3)], array(1, 8, 2), array(1, 2, 4, 4, 4)))


KEPT = {
    "3x3": ((3, 3, 8, 4), {}),
    "stride and overlap": ((3, 3, 8, 4), dict(strides=(2, 2), padding="SAME")),
    "1x1 in groups": ((1, 1, 2, 4), dict(feature_group_count=4)),
    "depthwise": ((3, 3, 1, 8), dict(feature_group_count=8)),
    "groups of the batch": ((1, 1, 8, 4), dict(batch_group_count=2)),
    "dilated kernel": ((2, 2, 8, 4), dict(strides=(2, 2), rhs_dilation=(2, 2))),
    "dilated input": ((1, 1, 8, 4), dict(lhs_dilation=(2, 2), padding=((0, 0), (0, 0)))),
    "padded patches": ((2, 2, 8, 4), dict(strides=(2, 2), padding=((1, 1), (0, 0)))),
}


@pytest.mark.parametrize("name", KEPT)
def test_convs_that_stay(name):
    kernel, params = KEPT[name]
    after = canonical(partial(conv, **params), array(*kernel), array(2, 6, 6, 8))
    assert [eqn.primitive.name for eqn in equations(after)] == ["conv_general_dilated"]


# ---- dots ----------------------------------------------------------------------------------------------------------


def test_weights_on_the_left(golden):
    golden(shown(lambda w, x: lax.dot(w, x), array(3, 4), array(4, 2)))


def test_weights_on_the_left_in_a_batch(golden):
    numbers = (((2,), (1,)), ((0,), (0,)))
    golden(shown(lambda w, x: lax.dot_general(w, x, numbers), array(5, 3, 4), array(5, 4, 2)))


def test_values_from_weights_alone_stand_right_too(golden):
    golden(shown(lambda w, x: lax.dot(lax.exp(w), x), array(3, 4), array(4, 2)))


def test_two_weights_and_two_inputs_keep_their_sides():
    def apply(p, x, y):
        return (lax.dot(p[0], p[1]), lax.dot(x, y))

    after = canonical(apply, [array(2, 3), array(3, 4)], array(2, 3), array(3, 4))
    assert [v for eqn in equations(after) for v in eqn.invars] == after.jaxpr.jaxpr.invars


def test_attention(golden):
    """Scores of queries with keys, over heads in the middle: batch dimensions lead, the contracted one stands last."""
    golden(shown(lambda _, q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), (), array(1, 5, 2, 4), array(1, 6, 2, 4)))


def test_weighted_values(golden):
    golden(shown(lambda _, p, v: jnp.einsum("bhqk,bkhd->bqhd", p, v), (), array(1, 2, 5, 6), array(1, 6, 2, 4)))


def test_contracting_two_dimensions_in_another_order(golden):
    numbers = (((2, 1), (0, 1)), ((), ()))
    golden(shown(lambda w, x: lax.dot_general(x, w, numbers), array(4, 3, 5), array(2, 3, 4)))


def test_dense_general_and_dense_are_both_dots_of_one_form():
    flat = canonical(lambda w, x: lax.dot(x, w), array(4, 6), array(2, 4))
    numbers = (((1,), (1,)), ((), ()))
    turned = canonical(lambda w, x: lax.dot_general(x, w, numbers), array(6, 4), array(2, 4))
    assert heavy(flat).params == heavy(turned).params
    assert [v.aval for v in heavy(flat).invars] == [v.aval for v in heavy(turned).invars]


# ---- shapes --------------------------------------------------------------------------------------------------------


def test_squeeze_and_expand(golden):
    golden(shown(lambda _, x: lax.sin(lax.expand_dims(lax.squeeze(x, (1,)), (0, 3))), (), array(2, 1, 3)))


def test_a_chain_that_ends_where_it_began(golden):
    golden(shown(lambda _, x: lax.sin(lax.squeeze(lax.expand_dims(x, (1,)), (1,))), (), array(2, 3)))


def test_broadcasts_of_unit_dimensions(golden):
    def apply(_, x, y):
        one = lax.broadcast_in_dim(x, (1, 3, 1), (1,))  # moves elements nowhere
        return one, lax.broadcast_in_dim(y, (4, 3), (1,))  # repeats them

    golden(shown(apply, (), array(3), array(3)))


def test_reshapes_merge(golden):
    golden(shown(lambda _, x: lax.reshape(lax.reshape(x, (6, 4)), (3, 8)), (), array(2, 3, 4)))


def test_transposes_merge(golden):
    golden(shown(lambda _, x: lax.transpose(lax.transpose(x, (2, 0, 1)), (0, 2, 1)), (), array(2, 3, 4)))


def test_transposes_that_undo_each_other(golden):
    golden(shown(lambda _, x: lax.sin(lax.transpose(lax.transpose(x, (2, 0, 1)), (1, 2, 0))), (), array(2, 3, 4)))


def test_transposes_of_unit_dimensions(golden):
    golden(shown(lambda _, x: lax.transpose(x, (1, 0, 3, 2)), (), array(1, 3, 1, 4)))


def test_what_changes_nothing_goes(golden):
    def apply(_, x):
        x = lax.convert_element_type(x, jnp.float32)
        x = lax.slice(lax.sin(x), (0, 0), (2, 3))
        return lax.reshape(lax.transpose(x, (0, 1)), (2, 3))

    golden(shown(apply, (), array(2, 3)))


# ---- commutative operations ----------------------------------------------------------------------------------------


def test_commutation(golden):
    """A literal, else a weight, stands right; two inputs keep their order, as do the operands of sub."""
    golden(shown(lambda w, x, y: (2.0 * (w + x) * y, w - x, lax.exp(w) * x), array(3), array(3), array(3)))


def test_what_fewer_products_lead_to_stands_left(golden):
    golden(shown(lambda w, x: (x @ w @ w + x @ w.T, x @ w * (x @ w.T), x + x @ w), array(4, 4), array(4, 4)))


def test_in_bodies_of_loops_and_branches(golden):
    """What a loop's body gets as constant weights is weights inside, too."""

    def apply(w, x):
        def step(carry, _):
            carry = lax.cond(carry[0, 0] > 0, lambda: lax.dot(w, carry), lambda: 2.0 * carry)
            return carry, None

        return lax.scan(step, x, None, 3)[0]

    golden(shown(apply, array(4, 4), array(4, 4)))


# ---- what every rule keeps -----------------------------------------------------------------------------------------

BF16 = jnp.bfloat16
REWRITTEN = {
    "weights on the left": (lambda w, x, **how: lax.dot(w, x, **how), (3, 4), (4, 2)),
    "order": (lambda w, x, **how: lax.dot_general(x, w, (((0,), (1,)), ((), ())), **how), (3, 4), (4, 2)),
    "1x1 conv": (conv, (1, 1, 8, 4), (2, 6, 6, 8)),
    "patches": (partial(conv, strides=(2, 2)), (2, 2, 8, 4), (2, 6, 6, 8)),
    "channels first": (partial(conv, padding="SAME", layout=NCHW), (4, 3, 3, 3), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_precision_and_accumulation_type_are_kept(name):
    fn, w, x = REWRITTEN[name]
    sides = (lax.Precision.HIGHEST, lax.Precision.DEFAULT)
    how: dict[str, Any] = dict(precision=sides, preferred_element_type=jnp.float32)
    after = canonical(partial(fn, **how), array(*w, dtype=BF16), array(*x, dtype=BF16))
    params = heavy(after).params
    assert set(params["precision"]) == set(sides)
    assert params["preferred_element_type"] == jnp.float32


@pytest.mark.parametrize("asked", ["default", "high", "tensorfloat32"])
@pytest.mark.parametrize("name", REWRITTEN)
def test_a_precision_that_a_gpu_has_by_itself_is_the_usual_one(name, asked):
    fn, w, x = REWRITTEN[name]
    after = canonical(partial(fn, precision=asked), array(*w), array(*x))
    usual = canonical(fn, array(*w), array(*x))
    assert heavy(after).params["precision"] is None
    assert str(after) == str(usual)


def test_of_operands_of_a_byte_high_is_more():
    """XLA adds up products of such operands less precisely, on a GPU that can, unless somebody asks for it."""
    how: dict[str, Any] = dict(precision="high", preferred_element_type=jnp.float32)
    after = canonical(partial(lax.dot, **how), *(array(*shape).astype(jnp.float8_e4m3fn) for shape in ((4, 3), (3, 2))))
    assert heavy(after).params["precision"] == (lax.Precision.HIGH, lax.Precision.HIGH)


def test_a_default_precision_changes_nothing_about_who_shares():
    fn, w, x = REWRITTEN["1x1 conv"]
    with jax.default_matmul_precision("tensorfloat32"):
        asked = coalesce.trace(fn, array(*w), array(*x), name="asked")
    plain = coalesce.trace(fn, array(*w), array(*x), name="plain")
    assert len(coalesce.fuse([asked, plain]).bundle.families) == 1


def test_a_precision_of_two_sides_changes_sides_with_its_operand():
    sides = (lax.Precision.HIGHEST, lax.Precision.DEFAULT)
    after = canonical(lambda w, x: lax.dot(w, x, precision=sides), array(3, 4), array(4, 2))
    assert heavy(after).params["precision"] == sides[::-1]


def test_new_equations_come_from_the_line_of_the_old():
    after = canonical(partial(conv, padding=((1, 0), (0, 2))), array(1, 1, 8, 4), array(2, 6, 6, 8))
    assert len(equations(after)) > 2  # and `checked` compared their lines
    assert heavy(after).source_info.traceback is not None
