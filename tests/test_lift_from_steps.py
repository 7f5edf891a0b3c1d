"""lift_from_steps: a product whose operand is there before a scan starts runs once for all steps; others stay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.lax import Precision

import coalesce
from coalesce.jaxpr import as_scan
from coalesce.models.recurrent import gru, lstm
from coalesce.passes import lift_from_steps as passes
from coalesce.passes.dce import dce
from coalesce.passes.inline import inline
from coalesce.passes.lift_from_steps import lift_from_steps
from tests.alone import array
from tests.rewrites import checked
from tests.small import check, counts

WIDE, STEPS = 8, 5


def names(eqns: Any) -> list[str]:
    return [eqn.primitive.name for eqn in eqns]


def lifted(fn: Any, params: Any, *inputs: Any) -> tuple[list[str], list[str]]:
    """The products and convolutions before the scan, and those in its body."""
    program = checked(lift_from_steps, dce(inline(coalesce.trace(fn, params, *inputs))))
    eqns = program.jaxpr.jaxpr.eqns
    heavy = {"dot_general", "conv_general_dilated"}
    (scan,) = [as_scan(eqn) for eqn in eqns if eqn.primitive.name == "scan"]
    return [n for n in names(eqns) if n in heavy], [n for n in names(scan.body.jaxpr.eqns) if n in heavy]


def rnn(p: Any, xs: Any, reverse: bool = False) -> Any:
    def step(h: Any, x: Any) -> Any:
        h = jnp.tanh(x @ p["in"] + h @ p["again"])
        return h, h

    return lax.scan(step, jnp.zeros((1, WIDE)), xs, reverse=reverse)


RNN = {"in": array(4, WIDE), "again": array(WIDE, WIDE)}
XS = array(STEPS, 1, 4)


def test_the_product_of_an_input(golden):
    program = dce(inline(coalesce.trace(rnn, RNN, XS, name="a")))
    golden(f"{program}\n\n# lift_from_steps, dce\n\n{dce(checked(lift_from_steps, program))}")


@pytest.mark.parametrize("reverse", [False, True])
def test_from_either_end(reverse):
    assert lifted(lambda p, xs: rnn(p, xs, reverse), RNN, XS) == (["dot_general"], ["dot_general"])


@pytest.mark.parametrize(("rows", "dtype", "asked", "got"), [
    (1, "float32", None, Precision.HIGHEST),
    (1, "float32", "default", Precision.HIGHEST),
    (1, "float32", "high", Precision.HIGHEST),
    (1, "float32", "highest", Precision.HIGHEST),
    (2, "float32", "high", Precision.HIGH),
    (2, "float32", None, None),
    (1, "bfloat16", None, None),
])  # fmt: skip
def test_one_row_stays_as_precise_as_it_is_alone(rows, dtype, asked, got):
    """On a GPU XLA uses TF32 for products of many rows, and not for those of one."""
    params = {"in": array(16, WIDE).astype(dtype), "again": array(WIDE, WIDE).astype(dtype)}

    def fn(p: Any, xs: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            h = jnp.tanh(jnp.dot(x, p["in"], precision=asked) + h @ p["again"])
            return h, h

        return lax.scan(step, jnp.zeros((rows, WIDE), dtype), xs)

    program = lift_from_steps(dce(inline(coalesce.trace(fn, params, array(STEPS, rows, 16).astype(dtype)))))
    (ahead,) = [eqn for eqn in program.jaxpr.jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert ahead.params["precision"] == (got and (got, got))


def test_what_an_input_is_computed_into_goes_along():
    """Two layers on the input, a cast and an index of the step: none of it waits for the carry."""

    def apply(p: Any, xs: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            i, x = x
            y = jnp.maximum(x.astype(jnp.float32) @ p["first"] + i, 0) @ p["second"]
            return h * 0.5 + y, y + h

        return lax.scan(step, jnp.zeros((1, WIDE)), (jnp.arange(STEPS, dtype=jnp.float32), xs))

    params = {"first": array(4, 16), "second": array(16, WIDE)}
    assert lifted(apply, params, XS.astype(jnp.bfloat16)) == (["dot_general"] * 2, [])


def test_a_convolution_of_frames():
    def apply(p: Any, frames: Any) -> Any:
        def step(h: Any, frame: Any) -> Any:
            dims = ("NHWC", "HWIO", "NHWC")
            return h + lax.conv_general_dilated(frame, p, (4, 4), "VALID", dimension_numbers=dims), None

        return lax.scan(step, jnp.zeros((1, 2, 2, 3)), frames)[0]

    assert lifted(apply, array(4, 4, 2, 3), array(3, 1, 8, 8, 2)) == (["conv_general_dilated"], [])


def test_out_of_a_scan_in_a_scan():
    """By the inner one first; what depends on the outer carry goes no further."""

    def apply(p: Any, xs: Any) -> Any:
        def outer(h: Any, x: Any) -> Any:
            def inner(g: Any, row: Any) -> Any:
                return g + row @ p["in"], None

            g, _ = lax.scan(inner, h @ p["again"], jnp.stack([x, 2 * x, x + 1]))
            return g, None

        return lax.scan(outer, jnp.zeros((1, WIDE)), xs)[0]

    params = {"in": array(16, WIDE), "again": array(WIDE, WIDE)}
    assert lifted(apply, params, array(STEPS, 1, 16)) == (["dot_general"], ["dot_general"])


def cumulated(p: Any, xs: Any) -> Any:
    return lax.scan(lambda h, x: (h + (h[:, :4] + x) @ p["in"], None), jnp.zeros((1, WIDE)), xs)[0]


def by_weights_of_the_step(p: Any, xs: Any) -> Any:
    return lax.scan(lambda h, x: (h + x[0] @ x[1], None), jnp.zeros((1, WIDE)), (xs, jnp.stack([p["in"]] * STEPS)))[0]


def many_rows(p: Any, xs: Any) -> Any:
    rows = jnp.broadcast_to(xs, (STEPS, 64, 4))
    return lax.scan(lambda h, x: (h + x @ p["in"], None), jnp.zeros((64, WIDE)), rows)[0]


def of_one_step(p: Any, xs: Any) -> Any:
    return lax.scan(lambda h, x: (h + x @ p["in"], None), jnp.zeros((1, WIDE)), xs[:1])[0]


def in_a_while_loop(p: Any, xs: Any) -> Any:
    def body(carry: Any) -> Any:
        i, h = carry
        return i + 1, h + xs[0] @ p["in"] + h @ p["again"]

    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, jnp.zeros((1, WIDE))))[1]


STAYS = {
    "it waits for the carry": cumulated,
    "no operand stays": by_weights_of_the_step,
    "its result is larger than its weight": many_rows,
    "one step": of_one_step,
    "nobody knows how many steps": in_a_while_loop,
}


@pytest.mark.parametrize("fn", STAYS.values(), ids=STAYS)
def test_what_stays(fn):
    program = dce(inline(coalesce.trace(fn, RNN, XS)))
    assert lift_from_steps(program) is program


def sorted_wide(p: Any, xs: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        wide = jnp.sort(jnp.concatenate([x] * 64, 0), 0)
        return h + wide[:1] @ p["in"], None

    return lax.scan(step, jnp.zeros((1, WIDE)), xs)[0]


def test_nor_of_what_a_product_is_computed_from(monkeypatch):
    program = dce(inline(coalesce.trace(sorted_wide, RNN, XS)))
    assert lift_from_steps(program) is not program
    monkeypatch.setattr(passes, "LARGEST", 64 * STEPS * 4 * 4 - 1)
    assert lift_from_steps(program) is program


def test_nothing_is_computed_twice():
    """The step reads the sorted input too; it gets it from outside."""

    def apply(p: Any, xs: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            x = jnp.sort(x, 1)
            return h + x @ p["in"], x + h[:, :4]

        return lax.scan(step, jnp.zeros((1, WIDE)), xs)

    program = checked(lift_from_steps, dce(inline(coalesce.trace(apply, RNN, XS))))
    inside = [as_scan(eqn).body for eqn in program.jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
    assert "sort" in names(program.jaxpr.jaxpr.eqns) and "sort" not in names(inside[0].jaxpr.eqns)


def test_a_product_does_not_take_another_along_that_stays():
    """The first has many rows, and stays in the scan; so does what is computed from it."""

    def apply(p: Any, xs: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            rows = jnp.broadcast_to(x, (64, 4)) @ p["in"]
            return h + jnp.max(rows, 0, keepdims=True) @ p["again"], None

        return lax.scan(step, jnp.zeros((1, WIDE)), xs)[0]

    program = dce(inline(coalesce.trace(apply, RNN, XS)))
    assert lift_from_steps(program) is program


def test_what_moves_keeps_its_context():
    """Which bits a key gives depends on an option of the place where they are drawn."""

    def noisy(p: Any, keys: Any) -> Any:
        def step(h: Any, key: Any) -> Any:
            with jax.threefry_partitionable(False):
                noise = jax.random.normal(key, (1, 4))
            return h + noise @ p["in"], h

        return lax.scan(step, jnp.zeros((1, WIDE)), keys)

    keys = [(jax.random.split(jax.random.key(i), STEPS),) for i in range(2)]
    program = dce(inline(coalesce.trace(noisy, RNN, *keys[0])))
    assert lift_from_steps(program) is not program
    check(noisy, [RNN, RNN], keys)


def test_a_users_own_rule_for_many_is_not_asked():
    """What it says of several values at once need not be what each of them gives."""

    @jax.custom_batching.custom_vmap
    def twice(x: Any) -> Any:
        return 2 * x

    @twice.def_vmap
    def rule(size: int, batched: Any, x: Any) -> Any:
        return 3 * x, True

    def apply(p: Any, xs: Any) -> Any:
        return lax.scan(lambda h, x: (h + twice(x) @ p["in"], None), jnp.zeros((1, WIDE)), xs)[0]

    program = dce(inline(coalesce.trace(apply, RNN, XS)))
    assert lift_from_steps(program) is program
    check(apply, [RNN], [(XS,)])


def test_a_number_is_no_weight():
    def apply(p: Any, xs: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            return h + lax.dot_general(x, 2.0, (((), ()), ((), ()))) + lax.dot_general(3.0, x, (((), ()), ((), ()))), h

        return lax.scan(step, 0.0, xs)

    check(apply, [{}, {}], [(jnp.arange(5.0),), (jnp.ones(5),)])


def test_no_more_is_kept_at_once_than_a_bound(monkeypatch):
    program = dce(inline(coalesce.trace(rnn, RNN, XS)))
    kept = STEPS * WIDE * 4
    monkeypatch.setattr(passes, "LARGEST", kept - 1)
    assert lift_from_steps(program) is program
    monkeypatch.setattr(passes, "LARGEST", kept)
    assert lift_from_steps(program) is not program


@pytest.mark.parametrize(("impl", "moves"), [("threefry2x32", True), ("rbg", False)])
def test_noise_is_that_of_each_step(impl, moves):
    """The bits of some generators depend on how many keys they are drawn for at once."""

    def noisy(p: Any, keys: Any) -> Any:
        def step(h: Any, key: Any) -> Any:
            return h + jax.random.normal(key, (1, 4)) @ p["in"], h

        return lax.scan(step, jnp.zeros((1, WIDE)), keys)

    keys = jax.random.split(jax.random.key(3, impl=impl), STEPS)
    program = dce(inline(coalesce.trace(noisy, RNN, keys)))
    assert (lift_from_steps(program) is not program) == moves
    check(noisy, [RNN, {name: 2 * w for name, w in RNN.items()}], [(keys,), (keys,)])


@pytest.mark.parametrize(("model", "before", "inside"), [(lstm, 1, 1), (gru, 3, 3)])
def test_a_recurrent_network_multiplies_its_input_once(model, before, inside):
    """The head's product comes after the scan."""
    small = model(hidden=WIDE, features=WIDE, classes=3, steps=4)
    params = small.init(jax.random.key(0), jnp.ones((1, 4, WIDE)))
    assert lifted(small.apply, params, array(1, 4, WIDE)) == (
        ["dot_general"] * (before + 1),
        ["dot_general"] * inside,
    )


def test_tenants_share_it():
    params = [{name: array(*w.shape) for name, w in RNN.items()} for _ in range(3)]
    assert counts(check(rnn, params, [(array(STEPS, 1, 4),) for _ in range(3)])) == (6, 2, 0)
