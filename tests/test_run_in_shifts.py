"""run_in_shifts: lanes of a scan work in shifts where the weights of all of them do not stay in the device's cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import coalesce
from coalesce import jaxpr as J
from coalesce.bundle import items, Loop
from coalesce.costs import Costs
from coalesce.costs.devices import CPU, H100
from coalesce.kernels import choose
from coalesce.models.recurrent import gru, lstm
from coalesce.passes.run_in_shifts import run_in_shifts
from tests.compare import assert_same
from tests.serving import assert_alone, BY_SLOT, fit_of, serve
from tests.small import check, D, dot, floats, sequences, weights
from tests.test_unroll_loops import rnn

ROW = 4 * D * D  # bytes of one lane's weight
RUNS = {"in shifts": (), "at once": ("run_in_shifts",)}
FREE = replace(H100, memory_gbs=1e-3)  # whatever a step reads again takes longer than any launch


def fitting(lanes: int, row: int = ROW) -> Costs:
    return Costs(replace(FREE, resident_bytes=lanes * row))


def by_rows(op: Any, groups: int, platform: str) -> str:
    """Products of one row by the kernel that reads its weights where they lie."""
    return "indexed_matvec" if op.m == 1 else choose(op, groups, platform)


def fused(fn: Any, n: int, fit: int, params: Any = None, **options: Any) -> coalesce.Fused:
    given = {"costs": fitting(fit), "choose_kernel": by_rows, **options}
    return check(fn, params or weights(n), sequences(n), **given)


def loops(fused: coalesce.Fused) -> list[Loop]:
    return [item for item in items(fused.bundle.schedule) if isinstance(item, Loop)]


def shifts(fused: coalesce.Fused) -> list[int]:
    return [loop.shifts for loop in loops(fused)]


def of_full_size(model: Any, dtype: str, lanes: int) -> list[coalesce.Program]:
    full = model(dtype=dtype, param_dtype=dtype)
    shapes = jax.eval_shape(full.init, jax.random.key(0), *full.example(jax.random.key(0)))
    one = coalesce.trace(full.apply, shapes, *full.example(jax.random.key(0)))
    return [replace(one, name=f"t{i}") for i in range(lanes)]


def test_lanes_work_in_shifts(golden):
    found = fused(rnn, 8, fit=4)
    assert shifts(found) == [2]
    golden(found)


@pytest.mark.once
@pytest.mark.parametrize(("lanes", "fit", "wanted"), [(8, 8, 1), (8, 7, 2), (8, 3, 4), (7, 3, 3), (8, 2, 4)])
def test_as_few_as_make_the_weights_fit(lanes, fit, wanted):
    """All as wide, if there is such a number."""
    assert shifts(fused(rnn, lanes, fit)) == [wanted]


@pytest.mark.once
@pytest.mark.parametrize(("lanes", "fit"), [(3, 2), (5, 2), (8, 1), (8, 0)])
def test_no_lane_works_alone(lanes, fit):
    assert shifts(fused(rnn, lanes, fit)) == [1]


@pytest.mark.once
def test_not_where_launches_cost_more_than_is_won():
    cheap = Costs(replace(H100, resident_bytes=4 * ROW))
    assert shifts(fused(rnn, 8, 4, costs=cheap)) == [1]


@pytest.mark.once
def test_a_step_that_is_short_for_fewer_lanes_is_no_loop_any_more():
    """64 LSTMs in float32 run all steps in 8 shifts, each of which is worth no loop."""
    programs = of_full_size(lstm, "float32", 64)
    options = {"platform": "gpu", "costs": Costs(H100), "choose_kernel": by_rows}
    found = {name: coalesce.fuse(programs, **options, without=without) for name, without in RUNS.items()}
    assert {name: [(i.shifts, i.unrolled) for i in loops(own)] for name, own in found.items()} == {
        "in shifts": [(8, True)],
        "at once": [(1, False)],
    }


@pytest.mark.once
def test_a_cpu_is_not_known_to_win():
    assert shifts(fused(rnn, 8, 4, costs=Costs(CPU))) == [1]


@pytest.mark.once
def test_one_step_reads_nothing_again():
    def once(p: Any, xs: Any) -> Any:
        return lax.scan(lambda h, x: (jnp.tanh(dot(h, p["w"]) + x), None), jnp.zeros(D), xs[:1])[0]

    assert shifts(fused(once, 8, fit=4)) == [1]


@pytest.mark.parametrize("reverse", [False, True])
def test_carries_and_what_steps_leave(reverse):
    """Of several dtypes, and one that is the same for all lanes."""

    def steps(p: Any, xs: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            count, h, most = carry
            h = jnp.tanh(dot(h, p["w"]) + x)
            return (count + 1, h, jnp.maximum(most, jnp.argmax(h))), (h, count)

        return lax.scan(step, (0, xs[0], jnp.argmax(xs[1])), xs, reverse=reverse)

    assert shifts(fused(steps, 6, fit=3)) == [2]


def test_without_a_carry_too():
    def mapped(p: Any, xs: Any) -> Any:
        return lax.map(lambda x: jnp.tanh(dot(x, p["w"])), xs)

    found = fused(mapped, 6, fit=3, without=["lift_from_steps"])
    assert shifts(found) == [2]


def test_what_all_lanes_share_is_read_by_all_shifts():
    shared = floats(50, D, D)

    def steps(p: Any, xs: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            return jnp.tanh(dot(dot(h, p["w"]), p["all"]) + x + p["bias"]), None

        return lax.scan(step, p["start"], xs)[0]

    params = weights(6)
    for i, own in enumerate(params):
        own |= {"all": shared, "bias": floats(60 + i, D), "start": floats(70, D)}
    assert shifts(fused(steps, 6, fit=4, params=params)) == [2]


@pytest.mark.once
def test_what_all_lanes_share_takes_room_too():
    shared = floats(50, D, D)

    def steps(p: Any, xs: Any) -> Any:
        return lax.scan(lambda h, x: (jnp.tanh(dot(dot(h, p["w"]), p["all"]) + x), None), jnp.zeros(D), xs)[0]

    params = [{**own, "all": shared} for own in weights(6)]
    assert [shifts(fused(steps, 6, fit, params=params)) for fit in (7, 6, 4, 3)] == [[1], [2], [2], [3]]


@pytest.mark.once
def test_a_weight_that_is_multiplied_twice_takes_room_once():
    def steps(p: Any, xs: Any) -> Any:
        return lax.scan(lambda h, x: (jnp.tanh(dot(dot(h, p["w"]), p["w"]) + x), None), jnp.zeros(D), xs)[0]

    assert [shifts(fused(steps, 6, fit)) for fit in (6, 5)] == [[1], [2]]


@pytest.mark.once
@pytest.mark.parametrize("own", [1, 2])
def test_not_where_several_products_of_a_program_are_one(own):
    """Of which one may multiply by what all lanes share, and stand first."""
    shared = floats(50, D, D)

    def steps(p: Any, xs: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            c, h = carry
            return (c * 0.5, jnp.tanh(dot(h, p["w"]) + x + dot(c, p["u"]) + dot(c, p["all"]))), None

        return lax.scan(step, (jnp.ones(D), jnp.zeros(D)), xs)[0]

    params = [{**one, "all": shared if own == 1 else floats(60 + i, D, D)} for i, one in enumerate(weights(6))]
    assert shifts(fused(steps, 6, fit=3, params=params, within_program=True)) == [1]
    assert max(shifts(fused(steps, 6, fit=6, params=params))) > 1


@pytest.mark.once
def test_no_more_is_unrolled_than_a_bound(monkeypatch):
    programs = of_full_size(lstm, "float32", 32)
    monkeypatch.setattr("coalesce.passes.run_in_shifts.MOST", 2000)
    assert shifts(coalesce.fuse(programs, platform="gpu", costs=Costs(H100), choose_kernel=by_rows)) == [1]


@pytest.mark.once
def test_loops_stay_where_none_is_to_be_unrolled():
    programs = of_full_size(lstm, "float32", 64)
    options = {"platform": "gpu", "costs": Costs(H100), "choose_kernel": by_rows, "without": ["unroll_loops"]}
    assert not any(loop.unrolled for loop in loops(coalesce.fuse(programs, **options)))


def test_what_the_shift_before_computed_has_no_tangents_here():
    """A carry that only a kernel reads, for which there is no derivative, stays without one."""

    def steps(p: Any, xs: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            h, total = carry
            return (jnp.tanh(dot(h, p["w"])), total + x), None

        return lax.scan(step, (jnp.ones(D), jnp.zeros(D)), xs)[0]

    found = fused(steps, 6, fit=3)
    assert shifts(found) == [2]
    run = jax.grad(lambda xs: sum(jnp.sum(total) for _, total in found([(x,) for x in xs])))
    for got in run([x for (x,) in sequences(6)]):
        assert_same(got, jnp.ones((5, D)))


def test_keys_and_flags_are_carried():
    def steps(p: Any, xs: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            h, key, done = carry
            key, own = jax.random.split(key)
            h = jnp.tanh(dot(h, p["w"]) + x + jax.random.uniform(own, (D,)))
            return (h, key, done | (h[0] > 0.5)), done

        (h, _, done), ys = lax.scan(step, (jnp.zeros(D), jax.random.key(3), False), xs)
        return h, done, ys

    assert shifts(fused(steps, 6, fit=3)) == [2]


@pytest.mark.once
def test_not_where_some_lanes_share_a_weight():
    """Its rows are not the lanes'."""
    params = weights(6)
    for own in params[1:3]:
        own["w"] = params[0]["w"]
    assert shifts(fused(rnn, 6, fit=3, params=params)) == [1]


@pytest.mark.once
def test_not_by_kernels_that_would_copy_weights():
    assert shifts(fused(rnn, 8, fit=4, choose_kernel=choose)) == [1]


@pytest.mark.once
def test_not_where_more_than_kernels_reads_much_of_a_lane(monkeypatch):
    """What is no pack's weight is copied for a shift, if it is the lanes' own."""

    def steps(p: Any, xs: Any) -> Any:
        return lax.scan(lambda h, x: (jnp.tanh(dot(h, p["w"]) + jnp.sum(p["u"]) + x), None), jnp.zeros(D), xs)[0]

    options = {"fit": 3, "without": ["lift_from_steps", "hoist_weights"]}
    monkeypatch.setattr("coalesce.passes.run_in_shifts.SMALL_ROW", ROW)
    assert shifts(fused(steps, 6, **options)) == [2]
    monkeypatch.setattr("coalesce.passes.run_in_shifts.SMALL_ROW", ROW - 1)
    assert shifts(fused(steps, 6, **options)) == [1]


@pytest.mark.once
def test_layers_that_a_scan_goes_through_are_read_once():
    def layers(p: Any, xs: Any) -> Any:
        return lax.scan(lambda h, w: (jnp.tanh(dot(h, w)), None), xs[0], p["w"])[0]

    params = [{"w": floats(i, 5, D, D)} for i in range(6)]
    assert shifts(fused(layers, 6, fit=3, params=params)) == [1]


@pytest.mark.once
def test_but_what_a_step_reads_all_of_is_copied(monkeypatch):
    """Though it is scanned over as well."""

    def steps(p: Any, xs: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            return jnp.tanh(dot(h, p["w"]) + x + jnp.sum(p["u"])), None

        return lax.scan(step, jnp.zeros(D), p["u"])[0]

    options = {"fit": 3, "without": ["lift_from_steps", "hoist_weights"]}
    assert shifts(fused(steps, 6, **options)) == [2]
    monkeypatch.setattr("coalesce.passes.run_in_shifts.SMALL_ROW", ROW - 1)
    assert shifts(fused(steps, 6, **options)) == [1]


def test_loops_inside_others_stay():
    """The inner one would read its weights anew for each shift of each step outside."""

    def nested(p: Any, xs: Any) -> Any:
        def outer(h: Any, x: Any) -> Any:
            return lax.scan(lambda g, _: (jnp.tanh(dot(g, p["w"]) + x), None), h, None, length=3)[0], None

        return lax.scan(outer, jnp.zeros(D), xs)[0]

    assert shifts(fused(nested, 6, fit=3)) == [2, 1]


@pytest.mark.parametrize("model", [lstm, gru], ids=["lstm", "gru"])
@pytest.mark.once
def test_recurrent_networks(model):
    """Whose steps read what was computed of all inputs in place."""
    small = model(hidden=16, features=8, classes=3, steps=3)
    keys = jax.random.split(jax.random.key(0), 5)
    params = [small.init(key, *small.example(key)) for key in keys]
    inputs = [small.example(key) for key in keys]
    row = 4 * 16 * 16 * (4 if model is lstm else 3)
    found = check(small.apply, params, inputs, costs=fitting(3, row), choose_kernel=by_rows)
    assert shifts(found) == [2]


def test_a_shift_waits_for_the_one_before_it():
    """By what it begins with: XLA keeps their kernels in that order."""
    found = fused(rnn, 6, fit=2).jaxpr.jaxpr
    steps = [eqn for eqn in found.eqns if eqn.primitive.name == "scan" or "optimization_barrier" in J.primitives(eqn)]
    scans, barriers = steps[::2], steps[1::2]
    assert [eqn.primitive.name for eqn in scans] == ["scan"] * 3 and len(barriers) == 2
    for before, barrier, after in zip(scans, barriers, scans[1:], strict=False):
        assert set(before.outvars) & set(barrier.invars)
        assert depends(after, barrier, found.eqns)


def depends(eqn: Any, on: Any, eqns: Any) -> bool:
    made = {id(v): other for other in eqns for v in other.outvars}
    todo, seen = [eqn], set[int]()
    while todo:
        found = todo.pop()
        if found is on:
            return True
        if id(found) not in seen:
            seen.add(id(found))
            todo += [made[id(atom)] for atom in found.invars if id(atom) in made]
    return False


def test_served_by_slot():
    """Lanes of a bank: a shift reads its own slots."""
    params = [own["w"] for own in weights(6)]
    xs = [x for (x,) in sequences(6)]

    def steps(w: Any, x: Any) -> Any:
        return lax.scan(lambda h, row: (jnp.tanh(dot(h, w) + row), h), jnp.zeros(D), x)

    options = replace(BY_SLOT, costs=fitting(2), choice=by_rows)
    serving = serve([fit_of(steps, w, (x,)) for w, x in zip(params, xs, strict=True)], capacity=8, options=options)
    executable = serving.executable(4)
    for order in ([5, 0, 3, 1], [2, 2, 4], [1]):
        for t, got in zip(order, serving.call(executable, [(t, (xs[t],)) for t in order]), strict=True):
            assert_alone(got, (steps, params[t], (xs[t],)))


@pytest.mark.once
@pytest.mark.parametrize(("model", "counts"), [(lstm, (2, 4)), (gru, (2, 4))], ids=["lstm", "gru"])
def test_recurrent_networks_of_full_size(model, counts):
    """32 LSTMs read 67 MB of weights a step in bfloat16, and 134 in float32; GRUs three quarters of that."""
    for dtype, count in zip(("bfloat16", "float32"), counts, strict=True):
        programs = of_full_size(model, dtype, 32)
        for lanes, own in ((8, 1), (32, count)):
            found = coalesce.fuse(programs[:lanes], platform="gpu", costs=Costs(H100), choose_kernel=by_rows)
            assert shifts(found) == [own]


def test_it_is_done_once():
    found = fused(rnn, 8, fit=4)
    assert run_in_shifts(found.bundle, costs=fitting(4)) is found.bundle
