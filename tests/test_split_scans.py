"""split_scans: several scans in a row compute what the one does, no part is too long, and weights are not copied."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import ClosedJaxpr

import coalesce
from coalesce import jaxpr as J
from coalesce.costs import Costs, device_of
from coalesce.costs.program import equation_us
from coalesce.passes.inline import inline
from coalesce.passes.split_scans import split_scans
from tests.alone import array

COSTS = Costs(device_of("cpu"))


def traced(fn: Callable[..., Any], params: Any, *inputs: Any) -> tuple[ClosedJaxpr, int]:
    program = inline(coalesce.trace(fn, params, *inputs, name="a"))
    return program.jaxpr, program.n_weights


def scans(jaxpr: ClosedJaxpr) -> list[J.Eqn]:
    return [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]


def split(jaxpr: ClosedJaxpr, n: int, parts: int) -> ClosedJaxpr:
    """The only scan of a program in so many parts, which are short enough then."""
    (whole,) = scans(jaxpr)
    length = J.as_scan(whole).length
    longest_us = equation_us(whole, COSTS) * (ceil(length / parts) + 0.5) / length
    found = split_scans(jaxpr, n, costs=COSTS, longest_us=longest_us)
    J.verify(found)
    assert split_scans(found, n, costs=COSTS, longest_us=longest_us) is found
    lengths = [J.as_scan(eqn).length for eqn in scans(found)]
    assert sum(lengths) == length and max(lengths) - min(lengths) <= 1
    return found


def recurrent(p: Any, xs: Any) -> Any:
    return lax.scan(lambda h, x: (h := jnp.tanh(h @ p["h"] + x @ p["x"]), (h, x.sum())), jnp.zeros((2, 4)), xs)


def backwards(p: Any, xs: Any) -> Any:
    return lax.scan(lambda h, x: (h := jnp.tanh(h @ p["h"] + x @ p["x"]), h), jnp.ones((2, 4)), xs, reverse=True)


def of_no_inputs(p: Any, x: Any) -> Any:
    """Its carry holds an integer and a flag; it reads and leaves nothing step by step."""

    def step(carry: Any, _: Any) -> Any:
        i, done, h = carry
        return (i + 1, done | (h.sum() > 2.0), jnp.where(done, h, jnp.tanh(h @ p["h"]) + 1.0)), None

    return lax.scan(step, (jnp.int32(0), False, x[0]), None, length=7)[0]


def of_no_carry(p: Any, xs: Any) -> Any:
    return lax.map(lambda x: {"y": x @ p["x"]}, xs)


def unrolled(p: Any, xs: Any) -> Any:
    return lax.scan(lambda h, x: (h := jnp.tanh(h @ p["h"] + x), h), jnp.ones((2, 4)), xs, unroll=6)


MODELS = [recurrent, backwards, of_no_inputs, of_no_carry, unrolled]


@pytest.mark.parametrize("fn", MODELS)
@pytest.mark.parametrize("parts", [2, 3])
def test_the_parts_are_the_scan(fn, parts):
    params, inputs = {"h": array(4, 4), "x": array(4, 4)}, array(7, 2, 4)
    jaxpr, n = traced(fn, params, inputs)
    found = split(jaxpr, n, parts)
    assert len(scans(found)) == parts
    leaves = [*jax.tree.leaves(params), inputs]
    each = zip(jaxpr.out_avals, J.evaluate(found, leaves), J.evaluate(jaxpr, leaves), strict=True)
    for aval, got, want in each:
        assert (got.shape, got.dtype) == (aval.shape, aval.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        np.testing.assert_array_equal(got, want)


def test_it_reads_as_one_after_the_other(golden):
    def apply(p, xs):
        return lax.scan(lambda h, x: (h := jnp.tanh(h @ p + x), h[0]), jnp.ones(4), xs)

    program = inline(coalesce.trace(apply, array(4, 4), array(6, 4), name="a"))
    after = program.with_jaxpr(split(program.jaxpr, program.n_weights, 2))
    golden(f"{program}\n\n# split_scans\n\n{after}")


def test_a_scan_over_weights_is_whole():
    """The weights themselves, and what is made of them alone."""
    for fn in (
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0],
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, 2.0 * p)[0],
    ):
        jaxpr, n = traced(fn, array(6, 4, 4), array(2, 4))
        assert split_scans(jaxpr, n, costs=COSTS, longest_us=0.0) is jaxpr


def test_keys_do_not_wait_between_parts():
    """Neither in a carry nor for later steps."""

    def carried(p, key):
        def step(carry, _):
            key, h = carry
            key, own = jax.random.split(key)
            return (key, h + jax.random.normal(own, (4,)) * p), None

        return lax.scan(step, (key, jnp.zeros(4)), None, length=6)[0][1]

    def read(p, key):
        keys = jax.random.split(key, 6)
        return lax.scan(lambda h, own: (h + jax.random.normal(own, (4,)) * p, None), jnp.zeros(4), keys)[0]

    for fn in (carried, read):
        jaxpr, n = traced(fn, array(4), jax.random.key(0))
        assert scans(jaxpr) and split_scans(jaxpr, n, costs=COSTS, longest_us=0.0) is jaxpr


def test_there_are_no_more_parts_than_asked_for():
    jaxpr, n = traced(recurrent, {"h": array(4, 4), "x": array(4, 4)}, array(40, 2, 4))
    assert len(scans(split_scans(jaxpr, n, costs=COSTS, longest_us=0.0))) == 14  # of three steps
    assert len(scans(split_scans(jaxpr, n, costs=COSTS, longest_us=0.0, most=5))) == 5
