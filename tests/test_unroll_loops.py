"""unroll_loops: where a step is short by the cost model, a scan of one family or of several is no loop any more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import coalesce
from coalesce.bundle import items, JointLoop, Loop
from coalesce.costs import Costs
from coalesce.costs.devices import CPU, H100, H200
from coalesce.jaxpr import as_scan
from coalesce.models.recurrent import gru, lstm
from coalesce.passes import unroll_loops as passes
from coalesce.passes.unroll_loops import unroll_loops
from experiments.planning_time import traced
from tests.small import check, D, dot, floats, sequences, vectors, weights

GPU = Costs(H100)


def rnn(p: Any, xs: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        h = jnp.tanh(dot(h, p["w"]) + dot(x, p["u"]))
        return h, h

    return lax.scan(step, jnp.zeros(D), xs)


def loops(fused: coalesce.Fused) -> list[bool]:
    """Of each scan of the plan, whether it is unrolled."""
    found = (item for item in items(fused.bundle.schedule) if isinstance(item, Loop | JointLoop))
    return [item.unrolled for item in found]


def scans(fused: coalesce.Fused) -> list[Any]:
    """The lengths of the scans of the fused program, in how many steps at once they run."""
    found = [eqn for eqn in fused.jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
    return [(eqn.params["length"], eqn.params["unroll"]) for eqn in found]


def test_a_recurrent_network_is_no_loop_on_a_gpu(golden):
    fused = check(rnn, weights(3), sequences(3), costs=GPU)
    assert loops(fused) == [True] and scans(fused) == [(5, 5)]
    golden(fused)


def test_on_a_cpu_it_stays_one():
    fused = check(rnn, weights(3), sequences(3), costs=Costs(CPU))
    assert loops(fused) == [False] and scans(fused) == [(5, 1)]


def test_steps_that_take_long_stay_in_their_loop():
    params = [{"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32), "u": jax.ShapeDtypeStruct((D, 4096), jnp.float32)}]

    def wide(p: Any, xs: Any) -> Any:
        return lax.scan(lambda h, x: (jnp.tanh(dot(h, p["w"]) + dot(x, p["u"])), None), jnp.zeros(4096), xs)[0]

    programs = [coalesce.trace(wide, params[0], *sequences(1)[0], name=f"t{i}") for i in range(8)]
    assert loops(coalesce.fuse(programs, costs=GPU)) == [False]


def test_no_more_is_compiled_than_a_bound(monkeypatch):
    """An inner scan counts once a step; here it is unrolled and the outer one is not."""

    def nested(p: Any, xs: Any) -> Any:
        def outer(h: Any, x: Any) -> Any:
            return lax.scan(lambda g, _: (jnp.tanh(dot(g, p["w"]) + x), None), h, None, length=3)[0], None

        return lax.scan(outer, jnp.zeros(D), xs)[0]

    assert loops(check(nested, weights(2), sequences(2), costs=GPU)) == [True, True]
    monkeypatch.setattr(passes, "MOST", 14)
    assert loops(check(nested, weights(2), sequences(2), costs=GPU)) == [False, True]


def test_values_that_a_step_hands_on_count_too(monkeypatch):
    """A body without an equation still is one copy a step."""

    def swapped(p: Any, x: Any) -> Any:
        return lax.scan(lambda c, _: ((c[1], c[0]), None), (x, x @ p["w"]), None, length=9)[0]

    assert loops(check(swapped, weights(2), vectors(2), costs=GPU)) == [True]
    monkeypatch.setattr(passes, "MOST", 2 * 9 - 1)
    assert loops(check(swapped, weights(2), vectors(2), costs=GPU)) == [False]


def test_scans_that_are_no_loops_stay_apart(monkeypatch):
    """Whatever their superkernel is predicted to win: by themselves they run side by side."""

    def steps(p: Any, xs: Any) -> Any:
        return lax.scan(lambda h, x: (jnp.tanh(dot(h, p["w"]) + x), None), jnp.ones(D), xs)[0]

    def other(p: Any, xs: Any) -> Any:
        return lax.scan(lambda h, x: (jnp.sin(dot(h, p["w"]) + x), None), jnp.ones(D), xs)[0]

    programs = [
        coalesce.trace(fn, {"w": floats(seed, D, D)}, floats(9, 30, D), name=fn.__name__)
        for seed, fn in enumerate((steps, other))
    ]
    both = 2 * passes.size(as_scan(next(e for e in programs[0].jaxpr.jaxpr.eqns if e.primitive.name == "scan"))) * 30
    dear = Costs(replace(H100, loop_us=100.0))
    for most, as_one in ((both, True), (both - 1, False)):  # together they may be too long
        monkeypatch.setattr(passes, "MOST", most)
        assert loops(coalesce.fuse(programs, costs=dear, platform="gpu")) == [True, True]
        assert loops(coalesce.fuse(programs, costs=dear, platform="gpu", policy="always")) == [as_one]
    monkeypatch.setattr(passes, "MOST", 0)
    assert loops(coalesce.fuse(programs, costs=dear, platform="gpu")) == [False]


def test_a_loop_whose_end_is_not_known_stays():
    def until(p: Any, x: Any) -> Any:
        return lax.while_loop(lambda h: jnp.sum(h) < 0, lambda h: dot(h, p["w"]), x)

    assert loops(check(until, weights(2), vectors(2), costs=GPU, pack_unbounded_loops=True)) == [False]


def test_the_steps_of_an_lstm_and_of_a_gru_stay_apart():
    """Though their gates would share superkernels, which was measured to lose; what is outside of the loops may not."""
    programs = traced(["lstm", "gru"], 2)
    auto, always = (
        coalesce.fuse(programs, costs=Costs(H200), platform="gpu", policy=policy) for policy in ("auto", "always")
    )
    assert loops(auto) == [True, True] and len(loops(always)) == 1
    places = [{place for group in fused.bundle.aligned for _, place in group.places} for fused in (auto, always)]
    assert [any("." in place for place in own) for own in places] == [False, True]


@pytest.mark.parametrize("reverse", [False, True])
def test_scans_that_run_as_one_are_unrolled_together(reverse):
    """The shorter one keeps its carry from its own end on."""
    short, long = [{"w": floats(seed, D, D)} for seed in range(2)]

    def steps(p: Any, xs: Any) -> Any:
        return lax.scan(lambda h, x: (jnp.tanh(dot(h, p["w"]) + x), h), jnp.ones(D), xs, reverse=reverse)

    xs = [(floats(7, 3, D),), (floats(8, 5, D),)]
    fused = check(steps, [short, long], xs, costs=GPU, policy="always")
    assert loops(fused) == [True] and scans(fused) == [(5, 5)]


@pytest.mark.parametrize(("most", "together"), [(passes.MOST, False), (0, True)])
def test_scans_that_share_no_superkernel_stay_apart_unless_they_are_loops(monkeypatch, most, together):
    """Then one of two saves the other's iterations."""
    monkeypatch.setattr(passes, "MOST", most)
    programs = []
    for name, model, size in (("lstm", lstm, 64), ("gru", gru, 24)):
        small = model(hidden=size, features=size, classes=3)
        shapes = jax.eval_shape(small.init, jax.random.key(0), small.example(jax.random.key(0))[0])
        programs.append(coalesce.trace(small.apply, shapes, *small.example(jax.random.key(0)), name=name))
    fused = coalesce.fuse(programs, costs=GPU, platform="gpu")
    assert [group.form for group in fused.bundle.aligned if group.form == "scan"] == ["scan"] * together
    assert loops(fused) == [not together] * (2 - together)


def test_it_is_done_once():
    fused = check(rnn, weights(2), sequences(2), costs=GPU)
    assert unroll_loops(fused.bundle, costs=GPU) is fused.bundle
