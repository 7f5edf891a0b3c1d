"""Scans are walked into: the heavy ops of a body are packed, whatever the loop carries, scans or holds fixed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from coalesce.models.recurrent import gru, lstm
from tests.small import check, counts, D, dot, floats, sequences, vectors, weights


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("unroll", [1, 2, True])
def test_scan_packs_its_body(reverse: bool, unroll: int | bool) -> None:
    def rnn(p: Any, xs: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            h = jnp.tanh(dot(h, p["w"]) + dot(x, p["u"]))
            return h, (h, x)

        return lax.scan(step, jnp.zeros(D), xs, reverse=reverse, unroll=unroll)

    assert counts(check(rnn, weights(3), sequences(3))) == (6, 2, 0)


def test_scan_over_weights() -> None:
    """Layers stacked in one array, one a step: each step's weight is a slice, not a weight of the bank."""

    def layers(p: Any, x: Any) -> Any:
        return lax.scan(lambda h, w: (jnp.tanh(dot(h, w)), None), x, p)[0]

    assert counts(check(layers, [floats(i, 6, D, D) for i in range(3)], vectors(3))) == (3, 1, 0)


def test_scan_over_shared_weights() -> None:
    def layers(p: Any, x: Any) -> Any:
        return lax.scan(lambda h, w: (jnp.tanh(dot(h, w)), h[0]), x, p)

    assert counts(check(layers, [floats(0, 6, D, D)] * 3, vectors(3))) == (3, 1, 0)


def test_scan_without_anything_to_scan() -> None:
    def power(p: Any, x: Any) -> Any:
        return lax.scan(lambda h, _: (dot(h, p["w"]), None), x, None, length=3)[0]

    assert counts(check(power, weights(2), vectors(2))) == (2, 1, 0)


def test_scan_of_no_steps() -> None:
    def none(p: Any, xs: Any) -> Any:
        return lax.scan(lambda h, x: (dot(h, p["w"]) + x, h), jnp.ones(D), xs)

    check(none, weights(2), [(jnp.zeros((0, D)),)] * 2)


def test_carry_that_starts_equal_and_comes_to_differ() -> None:
    """The second carry is the same in every lane at first, then takes the first one's value a step later."""

    def delay(p: Any, xs: Any) -> Any:
        def step(c: Any, x: Any) -> Any:
            a, b, n = c
            return (jnp.tanh(dot(a, p["w"]) + x), a, n + 1), (b, n)

        return lax.scan(step, (jnp.zeros(D), jnp.ones(D), 0), xs)

    assert counts(check(delay, weights(3), sequences(3))) == (3, 1, 0)


def test_nested_scans() -> None:
    def fn(p: Any, xs: Any) -> Any:
        def inner(h: Any, x: Any) -> Any:
            return jnp.tanh(dot(h, p["w"]) + x), h

        def outer(h: Any, x: Any) -> Any:
            h, hs = lax.scan(inner, h, jnp.stack([x, -x, dot(x, p["u"])]))
            return h, hs.sum(0)

        return lax.scan(outer, jnp.zeros(D), xs)

    assert counts(check(fn, weights(3), sequences(3))) == (6, 2, 0)


def test_shared_recurrence_with_own_inputs() -> None:
    """Lanes with one recurrent weight are rows of one product inside the loop."""

    def rnn(p: Any, xs: Any) -> Any:
        return lax.scan(lambda h, x: (jnp.tanh(dot(h, p["w"]) + x * p["b"]), h), jnp.zeros(D), xs)

    shared = floats(1, D, D)
    fused = check(rnn, [{"w": shared, "b": floats(i, D)} for i in range(4)], sequences(4))
    assert counts(fused) == (4, 1, 0)
    assert "as 1 problem of 4 lanes" in fused.explain()


@pytest.mark.parametrize("cell", [lstm, gru])
def test_recurrent_models(cell: Any) -> None:
    model = cell(features=3, hidden=4, classes=2, steps=3)
    x = model.example(jax.random.key(9))
    params = [jax.jit(model.init)(jax.random.key(i), *x) for i in range(3)]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        fused = check(model.apply, params, [model.example(jax.random.key(10 + i)) for i in range(3)])
    heavy, superkernels, alone = counts(fused)
    assert (heavy, alone) == (3 * superkernels, 0)


def test_while_loop_in_the_body() -> None:
    """Its trip count depends on the lane: the scan is walked into, the loop in it runs lane by lane."""

    def fn(p: Any, xs: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            h = lax.while_loop(lambda c: jnp.max(jnp.abs(c)) > 0.1, lambda c: dot(c, p["u"]) / 4, dot(h, p["w"]) + x)
            return h, h

        return lax.scan(step, jnp.ones(D), xs)

    assert counts(check(fn, weights(3), sequences(3))) == (6, 1, 3)


def test_results_that_no_lane_decides() -> None:
    """A counter and a constant beside the recurrence are the same in every lane; results are still every tenant's."""

    def fn(p: Any, xs: Any) -> Any:
        def step(c: Any, x: Any) -> Any:
            n, h = c
            return (n + 1, jnp.tanh(dot(h, p["w"]) + x)), (n, jnp.ones(2), x)

        return lax.scan(step, (0, jnp.zeros(D)), xs)

    assert counts(check(fn, weights(3), sequences(3))) == (3, 1, 0)
