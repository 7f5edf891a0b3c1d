"""segment: the parts compute what the whole does, whatever is cut where; cuts lie where they are asked for and pay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from jax import lax
from jax.extend.core import ClosedJaxpr

import coalesce
from coalesce import jaxpr as J
from coalesce.costs import Costs, device_of
from coalesce.costs.program import equations_us
from coalesce.passes.cse import merge
from coalesce.passes.cuts import choose_cuts, Demand, Point
from coalesce.passes.pipeline import normalise
from coalesce.passes.segment import segment, Segmented
from coalesce.passes.split_scans import split_scans
from coalesce.structure import canonical
from tests.alone import array
from tests.programs import Draw
from tests.serving_models import MODELS
from tests.tenants import draw_family, draw_model

COSTS = Costs(device_of("cpu"))
X, W = array(2, 8), [array(8, 8) for _ in range(4)]


def normal(fn: Callable[..., Any], params: Any, *inputs: Any) -> tuple[ClosedJaxpr, int]:
    program = normalise(coalesce.trace(fn, params, *inputs, name="a")).program
    return program.jaxpr, program.n_weights


def cut(fn: Callable[..., Any], params: Any, *inputs: Any, segments: int) -> Segmented:
    """Checked: the parts are the whole, and are cut no other way once they are joined again."""
    jaxpr, n = normal(fn, params, *inputs)
    found = segment(jaxpr, n, costs=COSTS, segments=segments)
    check(found, jaxpr, n, segments)
    return found


def check(found: Segmented, jaxpr: ClosedJaxpr, n: int, segments: int) -> None:
    whole = joined(found, jaxpr, n)
    if len(found.segments) > 1:
        jaxpr = split(jaxpr, n, segments)
    assert canonical(whole, n).key == canonical(merge(jaxpr), n).key
    for own in found.segments:
        J.verify(own.jaxpr)
        assert set(own.reads).isdisjoint(own.writes), "a segment that fails could not be run again"
        again = segment(own.jaxpr, len(own.weights), costs=COSTS, segments=1)
        assert again.segments[0].jaxpr is own.jaxpr
    count = len(found.segments)
    if count > 1 and split(whole, n, count) is whole:  # else what was split is split once more, and cut elsewhere
        assert str(segment(whole, n, costs=COSTS, segments=count)) == str(found)


def split(jaxpr: ClosedJaxpr, n: int, segments: int) -> ClosedJaxpr:
    """As `segment` does before it cuts."""
    longest_us = equations_us(jaxpr.jaxpr.eqns, COSTS) / segments
    return split_scans(jaxpr, n, costs=COSTS, longest_us=longest_us, most=segments)


def joined(found: Segmented, jaxpr: ClosedJaxpr, n: int) -> ClosedJaxpr:
    """The program that runs the segments one after the other, and reads and writes registers in between."""
    args, splicer = J.invars(jaxpr), J.Splicer()
    held: list[Any] = [None] * len(found.registers)
    outs: list[Any] = []
    for i, own in enumerate(found.segments):
        ins = [held[r] for r in own.reads] if i else args[n:]
        outs = splicer.inline(own.jaxpr, [*(args[w] for w in own.weights), *ins])
        for r, out in zip(own.writes, outs, strict=False):
            held[r] = out
    return merge(J.close(args, splicer.eqns, outs))


def mlp(p: Any, x: Any) -> Any:
    for w in p:
        x = jnp.tanh(x @ w)
    return x


def test_a_chain(golden):
    golden(cut(mlp, W[:2], X, segments=2))


def test_what_is_read_later_waits_in_registers_of_its_own(golden):
    """An input, a result and a residual; registers are used again once what lay there was read."""

    def apply(p, x, y):
        first = jnp.tanh(x @ p[0])
        x = jnp.tanh(first @ p[1]) + first
        x = jnp.tanh(x @ p[2]) @ p[3]
        return first.sum(), x + y

    golden(cut(apply, W, X, array(2, 8), segments=4))


def test_what_depends_on_no_request_is_computed_where_it_is_read(golden):
    def apply(p, x):
        mask = jnp.arange(8)[None] < jnp.arange(2)[:, None] + 3
        for w in p["w"]:
            x = jnp.where(mask, jnp.tanh(x @ w), 0.0) * p["gain"][None]
        return x

    golden(cut(apply, {"w": W[:2], "gain": array(8)}, X, segments=2))


def test_what_is_spread_waits_as_it_was_before():
    """A mask that all layers read, and a result."""

    def apply(p, x, keep):
        mask = jnp.broadcast_to(keep[:, None], (2, 8))
        for w in p:
            x = jnp.where(mask, jnp.tanh(x @ w), 0.0)
        return x, mask

    found = cut(apply, W, X, array(2) > 0, segments=3)
    assert [own.size for own in found.registers if own.dtype == bool] == [2]


def test_a_scan_is_cut_between_its_steps(golden):
    def apply(p, xs):
        h, _ = lax.scan(lambda h, x: (jnp.tanh(h @ p[0] + x), None), jnp.zeros((2, 8)), xs)
        return h @ p[1]

    golden(cut(apply, W[:2], array(24, 2, 8), segments=2))


def test_a_scan_is_cut_for_whoever_cannot_wait_and_else_is_whole():
    def apply(p, xs):
        return lax.scan(lambda h, x: (jnp.tanh(h @ p + x), None), jnp.zeros((2, 512)), xs)[0]

    jaxpr, n = normal(apply, array(512, 512), array(400, 2, 512))
    total_us = equations_us(jaxpr.jaxpr.eqns, COSTS)
    for slower in (1.0, 3.0):
        patience_us = slower * total_us / 3
        found = segment(jaxpr, n, costs=COSTS, patience_us=patience_us, slower=slower)
        assert len(found.segments) > 2 and max(found.predicted_us) <= patience_us
    for patience_us in (None, 2 * total_us):
        (whole,) = segment(jaxpr, n, costs=COSTS, patience_us=patience_us).segments
        assert whole.jaxpr is jaxpr


def test_a_scan_over_weights_is_a_whole_by_itself(golden):
    def apply(p, x):
        x = x @ p[0]
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack(p[1:3]))
        return x @ p[3]

    golden(cut(apply, W, X, segments=9))


def test_keys_do_not_wait_in_registers():
    def apply(p, x, key):
        for w in p:
            key, draw = jax.random.split(key)
            x = jnp.tanh(x @ w) + jax.random.normal(draw, (2, 8))
        return x, key

    found = cut(apply, W, X, jax.random.key(0), segments=6)
    assert not any(J.is_key(s) for s in found.registers)


def test_what_may_raise_or_not_end_is_not_cut():
    def raises(x):
        return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def loops(x):
        return jax.lax.while_loop(lambda v: v.sum() < 9, lambda v: v * 2, x)

    for last, why in ((raises, "a pure_callback, which may raise"), (loops, "a while_loop, which may not end")):
        jaxpr, n = normal(lambda p, x, last=last: last(mlp(p, x)), W, X)
        found = segment(jaxpr, n, costs=COSTS, segments=3)
        assert len(found.segments) == 1 and found.segments[0].jaxpr is jaxpr
        assert found.why.startswith(f"not cut: it holds {why}")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("segments", [2, 3, 5])
def test_models(name, segments):
    fn, params, inputs = MODELS[name]()
    found = cut(fn, params, *inputs, segments=segments)
    assert len(found.segments) <= segments
    if name in ("mlp", "convnet"):
        assert len(found.segments) == segments


@settings(max_examples=max(5, settings().max_examples // 10))
@given(st.integers(0, 2**64 - 1), st.integers(1, 6), st.integers(2, 6))
@example(892, 2, 2)  # one of whose loops would be split once more
def test_segments_of_random_programs_are_the_program(seed: int, ops: int, segments: int) -> None:
    draw = Draw(seed)
    model = draw_model(draw, ops, jnp.float32)
    (tenant, *_) = draw_family(draw, model, 1, {})
    jaxpr, n = normal(tenant.fn, tenant.params, *tenant.inputs)
    check(segment(jaxpr, n, costs=COSTS, segments=segments), jaxpr, n, segments)


def test_times_are_balanced():
    found = cut(mlp, [array(64, 64) for _ in range(12)], array(2, 64), segments=4)
    sizes = [sum(e.primitive.name == "dot_general" for e in own.jaxpr.jaxpr.eqns) for own in found.segments]
    assert sizes == [3, 3, 3, 3]
    assert sum(found.predicted_us) == pytest.approx(
        sum(equations_us(own.jaxpr.jaxpr.eqns, COSTS) for own in found.segments)
    )


def test_cuts_lie_where_little_is_live():
    """Layers that are wide inside and narrow between."""

    def apply(p, x):
        for up, down in p:
            x = jnp.tanh(x @ up) @ down
        return x

    found = cut(apply, [(array(4, 512), array(512, 4)) for _ in range(4)], array(4096, 4), segments=3)
    assert [s.shape for s in found.registers] == [(4096, 4)] * 2


LONG = [10_000.0] * 100  # a second of equations of ten milliseconds
EVERYWHERE = [Point(i, 1000) for i in range(1, 100)]


def test_nothing_is_cut_for_nobody():
    assert (
        choose_cuts(LONG, EVERYWHERE, COSTS, Demand(None, None)).why
        == "not cut: nobody waits for it (1e+03 ms predicted)"
    )


def test_what_the_most_urgent_tenant_can_wait_for_is_not_cut():
    found = choose_cuts(LONG, EVERYWHERE, COSTS, Demand(None, 1_000_000.0))
    assert not found.cuts and "can wait" in found.why


def test_as_few_cuts_as_make_the_longest_short_enough():
    found = choose_cuts(LONG, EVERYWHERE, COSTS, Demand(None, 300_000.0))
    assert [round(t / 10_000) for t in found.times_us] == [25, 25, 25, 25]


def test_cuts_that_cost_too_much_are_not_made():
    """A call more costs as much as the program; and some of what is asked for, if not all can be had."""
    short = choose_cuts([COSTS.call / 100] * 100, EVERYWHERE, COSTS, Demand(None, 1.0))
    assert not short.cuts and "costs too much" in short.why
    some = choose_cuts([COSTS.call / 2] * 100, EVERYWHERE, COSTS, Demand(None, 1.0))
    assert 2 <= len(some.times_us) <= 6


def test_many_places_are_thinned_out_to_those_with_the_least_live():
    points = [Point(i, 10 if i % 50 == 0 else 10**9) for i in range(1, 5000)]
    found = choose_cuts([100.0] * 5000, points, COSTS, Demand(5, None))
    assert len(found.cuts) == 4 and all(at % 50 == 0 for at in found.cuts)
