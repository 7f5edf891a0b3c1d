"""form_packs: every equation is scheduled once, heavy ops in packs as wide as their family."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from coalesce.bundle import packs
from coalesce.passes.form_packs import form_packs
from tests.alone import array
from tests.bundles import bundle_of, replanned

within = partial(form_packs, within_program=True)


def widths(bundle):
    return [pack.width for pack in packs(bundle.schedule)]


def dense(w, x):
    return lax.tanh(lax.dot(x, w))


def tenants(fn, params, inputs, count=2):
    return [(fn, params(), inputs()) for _ in range(count)]


def qkv(p, *inputs):
    """Of operands of their own: those of one operand are one product (passes/merge_products.py)."""
    q, k, v = (lax.dot(x, p[name]) for x, name in zip(inputs, "qkv", strict=True))
    return lax.dot(lax.tanh(q) * lax.sin(k), p["o"]) + v


def qkv_tenants(count):
    return tenants(qkv, lambda: {name: array(4, 4) for name in "qkvo"}, lambda: (array(2, 4),) * 3, count)


def test_two_lanes(golden):
    golden(replanned(form_packs, bundle_of(*tenants(dense, lambda: array(4, 3), lambda: (array(2, 4),)))))


def test_two_families(golden):
    def other(w, x):
        return lax.sin(lax.dot(x, w))

    lanes = tenants(dense, lambda: array(4, 3), lambda: (array(2, 4),))
    golden(replanned(form_packs, bundle_of(lanes[0], (other, array(4, 3), (array(2, 4),)), lanes[1])))


def test_q_k_and_v_of_one_program(golden):
    golden(replanned(within, bundle_of(*qkv_tenants(1))))


def test_q_k_and_v_of_two_lanes():
    assert widths(form_packs(bundle_of(*qkv_tenants(2)))) == [2, 2, 2, 2]
    assert widths(within(bundle_of(*qkv_tenants(2)))) == [6, 2]


def test_what_depends_on_another_is_in_no_pack_with_it():
    def chain(p, x):
        return lax.dot(lax.dot(x, p[0]), p[1])

    bundle = bundle_of(*tenants(chain, lambda: [array(4, 4), array(4, 4)], lambda: (array(2, 4),), 1))
    assert widths(within(bundle)) == [1, 1]


def test_the_body_of_a_scan(golden):
    def rnn(w, xs):
        return lax.scan(lambda c, x: (lax.tanh(lax.dot(c, w) + x), c), jnp.zeros(4), xs)

    golden(replanned(form_packs, bundle_of(*tenants(rnn, lambda: array(4, 4), lambda: (array(3, 4),)))))


def test_branches_of_each_lanes_own(golden):
    def apply(w, i, x):
        return lax.cond(i > 0, lambda: lax.dot(x, w), lambda: lax.neg(x))

    golden(replanned(form_packs, bundle_of(*tenants(apply, lambda: array(4, 4), lambda: (1, array(2, 4))))))


def test_a_loop_whose_end_depends_on_the_lane(golden):
    """Its dots are counted, and are in no pack; the dot after it is."""

    def apply(w, x):
        x = lax.while_loop(lambda c: lax.lt(lax.reduce_max(c, (0, 1)), 9.0), lambda c: lax.exp(lax.dot(c, w)), x)
        return lax.dot(x, w)

    golden(replanned(form_packs, bundle_of(*tenants(apply, lambda: array(4, 4), lambda: (array(2, 4),)))))


def test_a_loop_whose_end_depends_on_the_lane_packed_on_request():
    def apply(w, x):
        return lax.while_loop(lambda c: lax.lt(c[0, 0], 9.0), lambda c: lax.exp(lax.dot(c, w)), x)

    bundle = bundle_of(*tenants(apply, lambda: array(4, 4), lambda: (array(2, 4),)))
    assert widths(form_packs(bundle)) == []
    assert widths(form_packs(bundle, pack_unbounded_loops=True)) == [2]


def test_reasons_of_heavy_ops_alone():
    def reasons(run, *lanes):
        return [pack.reason for pack in packs(run(bundle_of(*lanes)).schedule)]

    [lane] = qkv_tenants(1)
    assert reasons(form_packs, lane)[0] == (
        "one lane in its family; 3 equal ops in its own program: see within_program=True"
    )
    assert reasons(within, lane) == ["", "one lane in its family, and no independent equal op in its program"]
    assert reasons(form_packs, lane, *qkv_tenants(1)) == [""] * 4


def test_equations_with_effects_are_scheduled():
    def apply(w, x):
        jax.debug.callback(lambda v: None, x)
        return lax.dot(x, w)

    bundle = form_packs(bundle_of(*tenants(apply, lambda: array(4, 4), lambda: (array(2, 4),))))
    assert len(bundle.schedule) == 2
