"""Branches and loops: packed where all lanes can go together, lane by lane where not, always as each tenant alone."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest
from jax import lax

from tests.compare import assert_bitwise
from tests.small import check, counts, D, dot, floats, sequences, vectors, weights

TRIPS = "its trip count depends on the lane"


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


def test_cond_inside_cond() -> None:
    def fn(p: Any, x: Any) -> Any:
        def inner(v: Any) -> Any:
            return lax.cond(v[1] > 0, lambda u: dot(u, p["w"]), lambda u: u, v)

        return lax.cond(x[0] > 0, inner, lambda v: dot(v, p["u"]), x)

    inputs = [(jnp.asarray([a, b, 1.0, 2.0]),) for a in (-1.0, 1.0) for b in (-1.0, 1.0)]
    assert counts(check(fn, weights(4), inputs)) == (8, 2, 0)


def test_branches_that_compute_nothing() -> None:
    """Operands, constants of either weak type, integers and bools come through the choice as they are."""

    def fn(p: Any, x: Any) -> Any:
        return lax.cond(x[0] > 0, lambda v: (v, 1.5, 7, True, p["w"]), lambda v: (-v, 2.5, 8, False, p["u"]), x)

    check(fn, weights(3), signed(1, -1, 1))


def test_scan_inside_cond() -> None:
    def fn(p: Any, x: Any) -> Any:
        def power(v: Any) -> Any:
            return lax.scan(lambda h, _: (dot(h, p["w"]), h[0]), v, None, length=3)

        return lax.cond(x[0] > 0, power, lambda v: (dot(v, p["u"]), jnp.arange(3.0)), x)

    assert counts(check(fn, weights(3), signed(1, -1, 1))) == (6, 2, 0)


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


def test_heavy_op_in_the_predicate() -> None:
    def fn(p: Any, x: Any) -> Any:
        return lax.while_loop(lambda c: jnp.max(dot(c, p["u"])) > 0.1, lambda c: dot(c, p["w"]) / 4, x)

    assert counts(check(fn, weights(3), vectors(3))) == (6, 0, 6)
    assert counts(check(fn, weights(3), vectors(3), pack_unbounded_loops=True)) == (6, 2, 0)


def test_cond_inside_packed_while() -> None:
    def fn(p: Any, x: Any, n: Any) -> Any:
        def step(i: Any, h: Any) -> Any:
            return lax.cond(i % 2 == 0, lambda v: jnp.tanh(dot(v, p["w"])), lambda v: dot(v, p["u"]) + 1, h)

        return lax.fori_loop(0, n, step, x)

    inputs = [(*x, jnp.asarray(n)) for x, n in zip(vectors(3), (0, 3, 4), strict=True)]
    assert counts(check(fn, weights(3), inputs, pack_unbounded_loops=True)) == (6, 2, 0)
