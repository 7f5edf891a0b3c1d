"""Scans, branches and loops: packed where all lanes can go together, lane by lane where not, always as each tenant alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import coalesce
from coalesce.models.recurrent import gru, lstm
from tests.compare import assert_bitwise, assert_same

D = 4
dot = partial(jnp.dot, precision="highest")
TRIPS = "its trip count depends on the lane"


def floats(seed: int, *shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32) / 2


def weights(n: int) -> list[dict[str, Any]]:
    return [{"w": floats(2 * i, D, D), "u": floats(2 * i + 1, D, D)} for i in range(n)]


def check(
    fn: Callable[..., Any], params: Sequence[Any], inputs: Sequence[tuple[Any, ...]], **options: Any
) -> coalesce.Fused:
    """Fuse, run and compare with each tenant alone."""
    programs = [coalesce.trace(fn, p, *x, name=f"t{i}") for i, (p, x) in enumerate(zip(params, inputs, strict=True))]
    fused = coalesce.fuse(programs, **options)
    for got, p, x in zip(fused(inputs), params, inputs, strict=True):
        assert_same(got, jax.jit(fn)(p, *x))
    return fused


def counts(fused: coalesce.Fused) -> tuple[int, int, int]:
    """(heavy ops, superkernels, alone)."""
    return fused.report.heavy_ops, fused.report.superkernels, fused.report.alone


def sequences(n: int) -> list[tuple[Any, ...]]:
    return [(floats(100 + i, 5, D),) for i in range(n)]


def vectors(n: int) -> list[tuple[Any, ...]]:
    return [(floats(100 + i, D),) for i in range(n)]


# ---- scan ----------------------------------------------------------------------------------------------------------


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


# ---- cond ----------------------------------------------------------------------------------------------------------


def either(p: Any, x: Any) -> Any:
    return lax.cond(x[0] > 0, lambda v: (dot(v, p["w"]), 1), lambda v: (jnp.sin(v), 2), x)


def signed(*signs: int) -> list[tuple[Any, ...]]:
    return [(jnp.abs(floats(i, D)) * sign,) for i, sign in enumerate(signs)]


@pytest.mark.parametrize("signs", [(1, -1, 1), (1, 1, 1), (-1, -1, -1)])
def test_cond_gives_each_lane_its_own_branch(signs: tuple[int, ...]) -> None:
    fused = check(either, weights(3), signed(*signs))
    assert counts(fused) == (3, 1, 0)
    assert "# run lane by lane" in fused.explain().splitlines()


def test_cond_with_one_predicate_for_all() -> None:
    """The predicate comes from a weight that the lanes share: a real branch stays in the program."""

    def fn(p: Any, x: Any) -> Any:
        return lax.cond(p["on"], lambda v: dot(v, p["w"]), lambda v: dot(v, p["u"]), x)

    for on in (jnp.asarray(True), jnp.asarray(False)):
        fused = check(fn, [{**p, "on": on} for p in weights(3)], vectors(3))
        assert counts(fused) == (6, 2, 0)
        assert [e.primitive.name for e in fused.jaxpr.jaxpr.eqns].count("cond") == 1


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (-5, 9, 1, 1)])
def test_switch_clamps_each_lane_index(indices: tuple[int, ...]) -> None:
    def fn(p: Any, x: Any, i: Any) -> Any:
        branches = [lambda v: dot(v, p["w"]), lambda v: dot(dot(v, p["u"]), p["w"]), jnp.sin, jnp.cos]
        return lax.switch(i, branches, x)

    inputs = [(*x, jnp.asarray(i)) for x, i in zip(vectors(4), indices, strict=True)]
    assert counts(check(fn, weights(4), inputs)) == (12, 3, 0)


def test_branch_not_taken_cannot_spoil_the_result() -> None:
    """Every lane computes both branches: a division by zero in the other one must not show."""

    def fn(p: Any, x: Any) -> Any:
        return lax.cond(x[0] > 0, lambda v: jnp.log(v), lambda v: 1 / (v + jnp.abs(v) - 1), x)

    check(fn, weights(2), [(jnp.ones(D),), (jnp.full(D, 0.5) * -1,)])


def test_branch_with_while_loop_runs_lane_by_lane() -> None:
    def halve(v: Any) -> Any:
        return lax.while_loop(lambda c: jnp.max(jnp.abs(c)) > 0.1, lambda c: c / 2, v)

    def fn(p: Any, x: Any) -> Any:
        return dot(lax.cond(x[0] > 0, lambda v: halve(dot(v, p["u"])), jnp.sin, x), p["w"])

    fused = check(fn, weights(3), signed(1, -1, 1))
    assert counts(fused) == (6, 1, 3)
    assert "cond: a branch holds a while_loop, which lanes that take another branch must not run" in fused.explain()


def test_cond_inside_scan() -> None:
    def fn(p: Any, xs: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            h = lax.cond(x[0] > 0, lambda v: dot(v, p["w"]), lambda v: dot(v, p["u"]) + x, h)
            return h, h

        return lax.scan(step, jnp.ones(D), xs)

    assert counts(check(fn, weights(3), sequences(3))) == (6, 2, 0)


# ---- loops ---------------------------------------------------------------------------------------------------------


def test_fori_loop_with_a_fixed_count() -> None:
    def fn(p: Any, x: Any) -> Any:
        return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(dot(h, p["w"])) + i, x)

    assert counts(check(fn, weights(3), vectors(3))) == (3, 1, 0)


def test_while_loop_that_all_lanes_leave_together() -> None:
    def fn(p: Any, x: Any) -> Any:
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(dot(c[1], p["w"]))), (0, x))

    assert counts(check(fn, weights(3), vectors(3))) == (3, 1, 0)


def until_count(p: Any, x: Any, n: Any) -> Any:
    return lax.fori_loop(0, n, lambda i, h: jnp.tanh(dot(h, p["w"])) + i, x)


COUNTS = [(0, 1, 4), (2, 2, 2)]


@pytest.mark.parametrize("trips", COUNTS)
def test_own_trip_counts_run_lane_by_lane(trips: tuple[int, ...]) -> None:
    inputs = [(*x, jnp.asarray(n)) for x, n in zip(vectors(3), trips, strict=True)]
    fused = check(until_count, weights(3), inputs)
    assert counts(fused) == (3, 0, 3)
    assert TRIPS in fused.explain() and "pack_unbounded_loops" in fused.explain()


@pytest.mark.parametrize("trips", COUNTS)
def test_own_trip_counts_packed_on_request(trips: tuple[int, ...]) -> None:
    inputs = [(*x, jnp.asarray(n)) for x, n in zip(vectors(3), trips, strict=True)]
    fused = check(until_count, weights(3), inputs, pack_unbounded_loops=True)
    assert counts(fused) == (3, 1, 0)
    assert TRIPS not in fused.explain()


@pytest.mark.parametrize("packed", [False, True])
def test_while_inside_while(packed: bool) -> None:
    def fn(p: Any, x: Any, n: Any) -> Any:
        def outer(c: Any) -> Any:
            i, h = c
            return i + 1, lax.fori_loop(0, i, lambda _, v: jnp.tanh(dot(v, p["w"])) + 0.1, h)

        return lax.while_loop(lambda c: c[0] < n, outer, (0, x))

    inputs = [(*x, jnp.asarray(n)) for x, n in zip(vectors(3), (0, 2, 4), strict=True)]
    assert counts(check(fn, weights(3), inputs, pack_unbounded_loops=packed)) == ((3, 1, 0) if packed else (3, 0, 3))


@pytest.mark.parametrize("packed", [False, True])
def test_lane_that_is_done_stays_as_it_is(packed: bool) -> None:
    """After its last trip a lane's value would become NaN, if it went on with the others."""

    def fn(p: Any, x: Any) -> Any:
        return lax.while_loop(lambda c: c > p, lambda c: jnp.sqrt(c - p), x)

    check(fn, [jnp.float32(1.0)] * 3, [(jnp.float32(v),) for v in (0.5, 50.0, 1e6)], pack_unbounded_loops=packed)


@pytest.mark.parametrize("packed", [False, True])
def test_poison_ends_its_own_loop_only(packed: bool) -> None:
    def fn(p: Any, x: Any) -> Any:
        return lax.while_loop(lambda c: jnp.max(c) > 0.1, lambda c: jnp.tanh(dot(c, p["w"])) / 2, jnp.abs(x))

    params, inputs = weights(3), vectors(3)
    fused = check(fn, params, inputs, pack_unbounded_loops=packed)
    clean = fused(inputs)
    inputs[1] = (jnp.full(D, jnp.nan),)
    poisoned = fused(inputs)
    assert_bitwise([poisoned[0], poisoned[2]], [clean[0], clean[2]])


def test_one_tenant_keeps_its_loops() -> None:
    """A family of one lane has nothing to pack or to run lane by lane."""
    fused = check(until_count, weights(1), [(*vectors(1)[0], jnp.asarray(3))])
    assert counts(fused) == (1, 0, 1)
    assert TRIPS not in fused.explain()
