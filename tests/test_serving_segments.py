"""Lanes that go through a program segment by segment, in other company each time, get what their tenants get alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from coalesce.serving.executable import compile_executable, Executable, trace_executable
from coalesce.serving.pool import Pool
from coalesce.serving.staging import Lane
from tests.alone import array, Tenant
from tests.compare import assert_bitwise, assert_same
from tests.hlo import instructions
from tests.programs import Draw, many_compiles
from tests.serving import assert_alone, BY_SLOT, CPU, fit_of, flat, results, serve, Serving
from tests.serving_models import lstm, mlp, MODELS, tenants
from tests.tenants import alone, draw_family, draw_model


@pytest.fixture(autouse=True, scope="module")
def cheap_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with many_compiles(tmp_path_factory.mktemp("compiled")):
        yield


def executables(serving: Serving, widths: Sequence[int] = (1, 2, 4)) -> list[dict[int, Executable]]:
    """Of each segment, by width."""
    count = len(serving.schema.segments[0])
    return [{w: serving.executable(w, segment=s) for w in widths} for s in range(count)]


def through(serving: Serving, made: list[dict[int, Executable]], lanes: Sequence[Lane], draw: Draw) -> list[list[Any]]:
    """The outputs of each lane. Every lane goes through all segments, with whichever others are drawn: at each turn
    some of those that wait at one segment run, in any order, in an executable that may be too wide."""
    at = [0] * len(lanes)
    found: list[list[Any]] = [[] for _ in lanes]
    while any(s < len(made) for s in at):
        s = draw.choice(sorted({s for s in at if s < len(made)}))
        waiting = draw.shuffled([i for i, own in enumerate(at) if own == s])
        chosen = waiting[: draw.integer(1, min(len(waiting), max(made[s])))]
        width = draw.choice([w for w in made[s] if w >= len(chosen)])
        outputs = serving.run(made[s][width], [lanes[i] for i in chosen])
        for place, i in enumerate(chosen):
            at[i] += 1
            if at[i] == len(made):
                found[i] = [np.array(x[place]) for x in outputs]
    return found


def with_states(serving: Serving, lanes: Sequence[Lane], draw: Draw) -> list[Lane]:
    """Each with a slot of the pool, in no order."""
    pool = serving.pools[0]
    states = draw.shuffled(range(pool.slots if pool else len(lanes)))
    return [lane._replace(state=state) for lane, state in zip(lanes, states, strict=False)]


def tagger(p: Any, xs: Any) -> Any:
    """A loop between two products."""
    hs, h = lstm(p["lstm"], jnp.tanh(jnp.dot(xs, p["in"], precision="highest")))
    return jnp.dot(hs, p["out"], precision="highest"), h


def tagger_tenant() -> Tenant:
    _, params, (xs,) = MODELS["lstm"]()
    return tagger, {"lstm": params, "in": array(4, 4), "out": array(6, 3)}, (xs,)


@pytest.mark.parametrize(
    "name, segments", [("mlp", 3), ("convnet", 4), ("tagger", 3), ("lstm", 3), ("transformer", 3), ("mixed", 3)]
)
@pytest.mark.once
def test_lanes_are_as_their_tenants_alone(name, segments):
    options = BY_SLOT if name == "convnet" else CPU
    model = MODELS.get(name, tagger_tenant)
    found = [model() for _ in range(3)]
    serving = serve([fit_of(fn, p, x) for fn, p, x in found], capacity=4, options=options, segments=segments)
    assert len(serving.schema.segments[0]) == segments
    made, draw = executables(serving, (1, 4) if name == "mlp" else (4,)), Draw(0)
    asked = [(t, model()[2]) for t in (2, 0, 2, 1, 0)]
    lanes = with_states(serving, [serving.lane(t, x) for t, x in asked], draw)
    for (t, x), got in zip(asked, through(serving, made, lanes, draw), strict=True):
        assert_alone(results(serving.fits[t], got), (*found[t][:2], x))


@settings(max_examples=max(5, settings().max_examples // 40))
@given(st.integers(0, 2**64 - 1), st.integers(2, 5), st.integers(2, 4))
@pytest.mark.once
def test_random_programs_in_segments(seed: int, ops: int, segments: int) -> None:
    draw = Draw(seed)
    model = draw_model(draw, ops, jnp.float32)
    found = draw_family(draw, model, 2, {})
    fits = [fit_of(t.fn, t.params, t.inputs, shared=t.shared) for t in found]
    if fits[0].key != fits[1].key:  # they share some weights, which makes them tenants of two banks
        fits, found = fits[:1], found[:1]
    serving = serve(fits, segments=segments)
    made = executables(serving, (2,))
    lanes = with_states(serving, [serving.lane(i, t.inputs) for i, t in enumerate(found)], draw)
    for fit, tenant, got in zip(fits, found, through(serving, made, lanes, draw), strict=True):
        assert_same(results(fit, got), jax.tree.map(np.asarray, alone(tenant)), tenant.model.exact)


def test_no_lane_reaches_another_nor_does_padding():
    """NaNs in the inputs, weights and registers of others: the same bits, from the same executables."""
    found = tenants("mlp", 3)
    bad = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), found[2][1])
    serving = serve([fit_of(mlp, p, found[0][2]) for p in (found[0][1], found[1][1], bad)], segments=3)
    made, pool = executables(serving, (4,)), serving.pools[0]
    assert pool is not None
    lanes = [serving.lane(0, found[0][2], state=5), serving.lane(1, found[1][2], state=2)]
    poison = Lane(serving.slots[2], [np.full_like(x, np.nan) for x in flat(serving.fits[2], found[2][2])])
    clean = [serving.run(own[4], lanes) for own in made][-1]
    assert all(np.isfinite(x[:2]).all() for x in clean)
    pool.registers = [jnp.full_like(x, jnp.nan) for x in pool.registers]
    others = [poison._replace(state=0), poison._replace(state=7)]
    poisoned = [serving.run(own[4], [*lanes, *others]) for own in made][-1]
    assert_bitwise([x[:2] for x in poisoned], [x[:2] for x in clean])
    assert all(np.isnan(x[2:]).all() for x in poisoned)


def test_padding_writes_nowhere():
    """One lane in an executable of four changes its own row of the registers, and a run for nothing changes none."""
    (tenant,) = tenants("mlp", 1)
    serving = serve([fit_of(*tenant[:2], tenant[2])], segments=3)
    pool = serving.pools[0]
    assert pool is not None
    for s, own in enumerate(executables(serving, (4,))[:2]):
        before = [np.asarray(x) for x in pool.registers]
        serving.run(own[4], [serving.lane(0, tenant[2], state=pool.slots)])
        assert_bitwise([np.asarray(x) for x in pool.registers], before)
        serving.run(own[4], [serving.lane(0, tenant[2], state=3)])
        for r, (x, y) in enumerate(zip(pool.registers, before, strict=True)):
            changed = set(np.flatnonzero((np.asarray(x) != y).reshape(pool.slots, -1).any(1)))
            assert changed == ({3} if r in serving.schema.segments[0].writes[s] else set())


def test_registers_are_changed_in_place():
    """Many calls of which none is waited for: the pool stays where it is, and the compiled program copies nothing."""
    found = tenants("mlp", 2)
    serving = serve([fit_of(fn, p, x) for fn, p, x in found], segments=3, states=64)
    made, pool = executables(serving, (2,)), serving.pools[0]
    assert pool is not None
    places = [x.unsafe_buffer_pointer() for x in pool.registers]
    lanes = [serving.lane(t, found[t][2], state=40 + t) for t in (0, 1)]
    pending = []
    for _ in range(20):
        for own in made:
            pending.append(own[2].run([serving.store.bank], [pool], own[2].stage([lanes])))
    assert [x.unsafe_buffer_pointer() for x in pool.registers] == places
    for (outputs,) in pending[2::3]:
        for i, t in enumerate((0, 1)):
            assert_alone(results(serving.fits[t], [np.asarray(x[i]) for x in outputs]), found[t])
    for own in made:
        assert_nothing_as_large_as_a_pool(own[2], pool)


def assert_nothing_as_large_as_a_pool(executable: Executable, pool: Pool) -> None:
    """But the pool itself: arguments, and what is scattered into them."""
    passed = "parameter scatter dynamic-update-slice tuple get-tuple-element fusion call while bitcast".split()
    size = min(x.size for x in pool.registers)
    text = executable.compiled.as_text()
    assert not [i.text for i in instructions(text) if i.elements >= size and i.opcode not in passed]


def test_segments_of_several_families_share_a_call():
    """Each with a pool of its own, at any segment."""
    found = {name: tenants(name, 2) for name in ("mlp", "convnet")}
    each = [serve([fit_of(fn, p, x) for fn, p, x in own], segments=2, states=4096) for own in found.values()]
    pools = [s.pools[0] for s in each]

    def call(executable: Executable, entries: list[list[Lane]]) -> list[Any]:
        banks = [s.store.bank for s in each]
        return executable.fetch(executable.run(banks, pools, executable.stage(entries)))

    lanes = [[s.lane(t, own[t][2], state=3 + t) for t in (1, 0)] for s, own in zip(each, found.values(), strict=True)]
    both = compile_executable([s.lanes(2) for s in each])
    assert call(both, lanes) == [None, None]
    second = each[0].run(each[0].executable(2, segment=1), lanes[0])  # family 0 goes on alone,
    late = [each[0].lane(0, MODELS["mlp"]()[2], state=9)]
    mixed = compile_executable([each[0].lanes(1), each[1].lanes(2, segment=1)])
    (nothing, other) = call(mixed, [late, lanes[1]])  # and then family 1, beside a late lane of family 0
    assert nothing is None
    for serving, own, outputs in zip(each, found.values(), (second, other), strict=True):
        for i, t in enumerate((1, 0)):
            assert_alone(results(serving.fits[t], [x[i] for x in outputs]), own[t])
    got = each[0].run(each[0].executable(1, segment=1), late)
    assert_alone(results(each[0].fits[0], [x[0] for x in got]), (*found["mlp"][0][:2], tuple(late[0].inputs)))
    for pool in pools:
        assert pool is not None
        assert_nothing_as_large_as_a_pool(mixed, pool)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # by JAX 0.11 and newer
def test_a_gpu_gets_its_pools_in_place():
    """Lowered for a GPU on a machine without one: every register that is written is donated, and scattered into."""
    found = tenants("mlp", 2)
    serving = serve([fit_of(fn, p, x) for fn, p, x in found], segments=3)
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = trace_executable([serving.lanes(4, segment=1)], packed=True)
        text = traced.function.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("tf.aliasing_output") == len(traced.states.written) == 1
    assert text.count('"stablehlo.scatter"') == 1


def test_all_segments_read_one_bank():
    fits = [fit_of(fn, p, x) for fn, p, x in tenants("convnet", 2)]
    whole, cut = serve(fits), serve(fits, segments=4)
    assert [x.shape for x in cut.store.bank] == [x.shape for x in whole.store.bank]


def test_a_pool_gives_out_each_place_once():
    pool = Pool([jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((), jnp.bool_)], 3)
    assert pool.nbytes == 3 * (24 + 1)
    taken = [pool.take() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2] and not pool.free
    with pytest.raises(AssertionError, match="all 3 places"):
        pool.take()
    pool.release(1)
    assert pool.take() == 1


def test_a_call_that_took_its_pool_along_is_noticed():
    """What was donated to a call that failed is gone; what was not is there."""
    pool = Pool([jax.ShapeDtypeStruct((2,), jnp.float32)], 3)
    assert not pool.restore() and pool.life == 0
    pool.registers[0].delete()
    assert pool.restore() and pool.life == 1
    assert_bitwise(np.asarray(pool.registers[0]), np.zeros((3, 2), np.float32))


def test_what_asked_for_more_is_cut_as_often_as_it_can_be():
    fn, params, inputs = tagger_tenant()
    assert 1 < len(serve([fit_of(fn, params, inputs)], segments=50).schema.segments[0]) < 50
    wide = [fit_of(mlp, [(array(6, 6), array(6))], (array(2, 6),))]
    assert serve(wide, segments=1).pools == [None]


@pytest.mark.slow
def test_soak() -> None:
    """More of them: `make soak` draws ten times as many."""
    test_random_programs_in_segments()
