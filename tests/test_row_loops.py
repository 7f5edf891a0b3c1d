"""Loops under `jax.vmap`, of which each row ends by itself: as each tenant alone, wherever they stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.small import check, counts, D, dot, floats, weights

Row = Callable[[Any], Any]


def until(p: Any) -> Row:
    """A row that grows until its sum is 2. Its work on weights alone can leave the loop, its rows need other steps."""

    def grown(row: Any) -> Any:
        return row + jnp.abs(dot(row, p["w"].T)) + 0.1

    return lambda row: lax.while_loop(lambda s: s.sum() < 2, grown, row)


def rows(n: int, *shape: int) -> list[tuple[Any, ...]]:
    return [(floats(100 + i, *shape),) for i in range(n)]


HOW = pytest.mark.parametrize(("tenants", "packed"), [(1, False), (3, False), (3, True)])


@HOW
def test_rows_end_by_themselves(tenants: int, packed: bool) -> None:
    """As many rows as columns: whose predicate is whose does not show in the shapes."""

    def fn(p: Any, x: Any) -> Any:
        return jax.vmap(until(p))(x)

    fused = check(fn, weights(tenants), rows(tenants, D, D), pack_unbounded_loops=packed)
    assert counts(fused) == ((3, 1, 0) if packed else (tenants, 0, tenants))


@HOW
def test_loops_in_loops_branches_and_calls(tenants: int, packed: bool) -> None:
    """The branch is another one for each lane, and does not run for all."""

    def fn(p: Any, x: Any) -> Any:
        all_rows = jax.jit(jax.vmap(until(p)))
        twice = jax.vmap(jax.vmap(until(p), in_axes=1), in_axes=2)(x.reshape(D, 2, 2))
        scanned = lax.scan(lambda c, _: (all_rows(c / 2), c), x, None, length=2)
        branched = lax.cond(p["u"][0, 0] > 0, all_rows, jnp.sin, x)
        outer = lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, all_rows(s[1] / 2)), (0, x))
        inner = lax.while_loop(lambda s: s.max() < 2, lambda s: until(p)(s) + 0.1, x[0])
        return twice, scanned, branched, outer, inner, jax.vmap(lambda r: lax.fori_loop(0, r, until_two, r))(counted(x))

    def until_two(i: Any, n: Any) -> Any:
        return lax.while_loop(lambda s: s % 3 != 2, lambda s: s + 1, n + i)

    def counted(x: Any) -> Any:
        return (jnp.abs(x[:, 0]) * 8).astype(jnp.int32)

    fused = check(fn, weights(tenants), rows(tenants, D, D), pack_unbounded_loops=packed)
    assert counts(fused) == ((15, 4, 3) if packed else (5 * tenants, 0, 5 * tenants))


@pytest.mark.parametrize("packed", [False, True])
def test_all_kinds_of_carries(packed: bool) -> None:
    """Keys, flags, weak types, arrays without elements, and what ends the loop by itself."""

    def fn(p: Any, x: Any) -> Any:
        def step(s: Any) -> Any:
            row, key, n, flag, weak, empty = s
            own, key = jax.random.split(key)
            return row + jnp.abs(dot(row, p["w"])) + jax.random.uniform(own), key, n + 1, ~flag, 1.5, empty

        def loop(row: Any, key: Any) -> Any:
            start = (row, key, 0, False, 1.0, jnp.zeros((0, 3)))
            row, key, *rest = lax.while_loop(lambda s: (s[0].sum() < 3) & (s[2] < 4), step, start)
            return row, jax.random.key_data(key), *rest

        return jax.vmap(loop)(x, jax.random.split(jax.random.key(0), len(x)))

    check(fn, weights(2), rows(2, 3, D), pack_unbounded_loops=packed)
