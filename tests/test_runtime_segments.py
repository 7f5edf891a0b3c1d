"""The runtime where programs are cut: what happens to lanes between two segments, and to executables of several
families.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from coalesce.errors import InvalidInput, StateLost, TenantFailure
from coalesce.runtime.device import Device
from coalesce.runtime.runtime import Runtime
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.commands import Want
from tests.checked import checked_runtime

WIDTH, SLO = 12, 30.0


def deep(params: Any, x: jax.Array) -> jax.Array:
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def steep(params: Any, x: jax.Array) -> jax.Array:
    """Another family."""
    for w in params:
        x = jnp.sin(x @ w)
    return x


def deep_and_one(params: Any, x: jax.Array) -> jax.Array:
    return deep(params, x) + 1


def looped(params: Any, x: jax.Array) -> jax.Array:
    """One equation."""
    return lax.scan(lambda h, _: (jnp.tanh(h @ params[0]), None), x, None, length=8)[0]


def weights(seed: int, layers: int = 3, width: int = WIDTH) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((width, width)) / np.sqrt(width), jnp.float32) for _ in range(layers)]


def row(seed: int, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, width)).astype(np.float32)


def assert_right(got: Any, fn: Any, params: Any, x: Any) -> None:
    np.testing.assert_allclose(got, np.asarray(jax.jit(fn)(params, x)), rtol=2e-5, atol=2e-6)


def device_of(rt: Runtime) -> Device:
    return rt._stations[0].device


def pool_of(rt: Runtime, tenant: str) -> Any:
    (course,) = rt._tenancy.residents[tenant].host.courses
    return course.pool


@pytest.fixture(scope="module")
def three() -> Iterator[Runtime]:
    """Tenants "t0" to "t2" of one family, in three segments."""
    with checked_runtime(widths=(1, 2, 4), segments=3, compiled=False) as rt:
        for i in range(3):
            rt.add_tenant(f"t{i}", deep, weights(i), example=(row(0),), slo=SLO)
        rt.warm_up(120.0)
        yield rt


def test_every_place_is_given_back(three):
    """After results, cancels, removals and refusals."""
    pool = pool_of(three, "t0")
    replies = [three.submit(f"t{i % 3}", row(i), deadline=1e-9 if i % 5 == 0 else None) for i in range(60)]
    for reply in replies[::3]:
        reply.cancel()
    three.remove_tenant("t2", drain=False)
    assert three.drain(60.0)
    for i, reply in enumerate(replies):
        if not reply.cancelled() and reply.exception(0) is None:
            assert_right(reply.result(0), deep, weights(i % 3), row(i))
    assert pool.free == pool.slots == 20
    three.add_tenant("t2", deep, weights(2), example=(row(0),), slo=SLO)


def test_more_requests_than_places(three):
    replies = [three.submit(f"t{i % 3}", row(i)) for i in range(200)]
    for i, reply in enumerate(replies):
        assert_right(reply.result(60), deep, weights(i % 3), row(i))


def fail_at(rt: Runtime, segment: int, lose: bool) -> Future[None]:
    """The next run of several lanes of a segment fails, with or without the registers that it was to write."""
    device, failed = device_of(rt), Future[None]()

    def raises(x: Any) -> Any:
        raise ValueError("the device says no")

    broken = jax.jit(lambda x: x + jax.pure_callback(raises, jax.ShapeDtypeStruct((), jnp.float32), x[0, 0, 0]))
    places = [(own, own.executable.lanes[0]) for own in device._loaded.values()]
    loaded = [own for own, lanes in places if lanes.segment == segment and lanes.width > 1]
    whole = {id(own): own.executable.compiled for own in loaded}

    def run_of(own: Any) -> Any:
        def run(banks: Any, kept: Any, written: Any, arguments: Any) -> Any:
            _, registers = arguments[0]  # those beyond the pool's are of lanes that there are not
            if failed.done() or (registers < written[0].shape[0]).sum() < 2:
                return whole[id(own)](banks, kept, written, arguments)
            failed.set_result(None)
            if not lose:
                raise ValueError("the device says no, before it has begun")
            for register in written:
                register.delete()
            after = [broken(jnp.ones(register.shape, jnp.float32)) for register in written]
            return after, [[after[0][0]]]

        return run

    for own in loaded:
        object.__setattr__(own.executable, "compiled", run_of(own))
    return failed


def test_a_bundle_that_did_not_begin_runs_again(three):
    """Whatever its lanes read is there still; the pool is as it was."""
    pool, failed = pool_of(three, "t0"), fail_at(three, segment=1, lose=False)
    life = pool.life
    while not failed.done():
        replies = [three.submit(f"t{i % 3}", row(i)) for i in range(12)]
        for i, reply in enumerate(replies):
            assert_right(reply.result(60), deep, weights(i % 3), row(i))
    assert failed.done() and pool.life == life and pool.free == pool.slots


def test_a_bundle_that_takes_its_registers_along_concerns_who_had_values_there(three):
    """They fail, or begin again; nobody gets what is wrong, and whoever comes later is served as ever."""
    pool, failed = pool_of(three, "t0"), fail_at(three, segment=1, lose=True)
    life = pool.life
    replies, lost = [], 0
    while not failed.done():
        replies += [three.submit(f"t{i % 3}", row(i)) for i in range(12)]
        three.drain(60.0)
    for i, reply in enumerate(replies):
        i = i % 12
        error = reply.exception(60)
        if error is None:
            assert_right(reply.result(0), deep, weights(i % 3), row(i))
            continue
        assert isinstance(error, StateLost | TenantFailure) and ("was lost" in str(error) or "says no" in str(error))
        lost += 1
    assert failed.done() and lost and pool.life == life + 1
    for i in range(6):
        assert_right(three.submit(f"t{i % 3}", row(i)).result(60), deep, weights(i % 3), row(i))
    assert pool.free == pool.slots


def test_registers_that_are_lost_before_a_launch_are_read_by_nobody(three):
    """The finisher may learn of it at any time, so also after the policy has decided."""
    device, pool, losses = device_of(three), pool_of(three, "t0"), []
    launch, life = device.launch, pool.life

    def lose_first(executable: int, entries: Any) -> Any:
        if not losses and device._loaded[executable].executable.lanes[0].is_last:
            losses.append(executable)
            for register in pool.registers:
                register.delete()
            pool.suspect = True
        return launch(executable, entries)

    device.launch = lose_first
    try:
        replies = [three.submit(f"t{i % 3}", row(i)) for i in range(12)]
        errors = [reply.exception(60) for reply in replies]
    finally:
        del device.launch
    assert losses and pool.life == life + 1 and any(errors)
    for i, (reply, error) in enumerate(zip(replies, errors, strict=True)):
        if error is None:
            assert_right(reply.result(0), deep, weights(i % 3), row(i))
        assert error is None or "was lost" in str(error)


def test_weights_are_replaced_under_way_and_nobody_gets_some_of_each(three):
    stop, seen = threading.Event(), []

    def client() -> None:
        while not stop.is_set():
            seen.append(three.submit("t0", row(7)).result(60))

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    host = three._tenancy.residents["t0"].host
    free = host.store.free
    for turn in range(12):
        three.update_tenant("t0", weights(100 + turn % 2))
    latest = three.submit("t0", row(7)).result(60)
    stop.set()
    for thread in threads:
        thread.join()
    three.update_tenant("t0", weights(0))
    right = [np.asarray(jax.jit(deep)(weights(seed), row(7))) for seed in (0, 100, 101)]
    assert len(seen) > 3
    assert all(any(np.allclose(got, want, rtol=2e-5, atol=2e-6) for want in right) for got in seen)
    assert_right(latest, deep, weights(101), row(7))
    assert_right(three.submit("t0", row(7)).result(60), deep, weights(0), row(7))
    assert host.store.free == free


def count_cuts(rt: Runtime) -> list[float]:
    """The patience with which programs were tried to be cut."""
    device, asked = device_of(rt), list[float]()
    cut = device.cut

    def counted(template: Any, patience_us: float, slower: float) -> Any:
        asked.append(patience_us)
        return cut(template, patience_us, slower)

    object.__setattr__(device, "cut", counted)
    return asked


@pytest.mark.once
def test_what_the_most_urgent_tenant_cannot_wait_for_is_cut():
    """A long program beside one with an SLO shorter than it; and none that is alone, or beside patient ones."""
    long, rows = [weights(i, 6, 512) for i in range(2)], np.tile(row(3, 512), (256, 1))
    with checked_runtime(widths=(1,), compiled=False) as rt:
        rt.add_tenant("patient", steep, weights(0), example=(row(0),), slo=1000.0)
        rt.add_tenant("whole", deep, long[0], example=(rows,), slo=SLO)
        assert pool_of(rt, "whole") is None
        rt.add_tenant("urgent", steep, weights(1), example=(row(0),), slo=0.0005)
        asked = count_cuts(rt)
        rt.add_tenant("hopeless", steep, weights(2), example=(row(0),), slo=1e-6)
        rt.add_tenant("as hopeless", steep, weights(3), example=(row(0),), slo=1e-6)
        assert len(asked) <= 3  # what cannot be cut for the first is not tried for the second
        rt.add_tenant("cut", deep_and_one, long[1], example=(rows,), slo=SLO)
        rt.add_tenant("loop", looped, long[0], example=(rows,), slo=SLO)
        for name, fn, own in (("cut", deep_and_one, long[1]), ("loop", looped, long[0])):
            (course,) = rt._tenancy.residents[name].host.courses
            assert len(course.segments) > 1 and "segments of" in course.segments.why
            assert_right(rt.submit(name, rows).result(60), fn, own, rows)


@pytest.mark.once
def test_a_program_is_cut_while_it_is_served_for_a_tenant_who_cannot_wait_for_it():
    """Nobody's requests are lost on the way, and what was made for the whole program goes."""
    params, rows = [weights(i, 6, 512) for i in range(2)], np.tile(row(3, 512), (256, 1))
    with checked_runtime(widths=(1,), capacity=2, compiled=False) as rt:
        for i, own in enumerate(params):
            rt.add_tenant(f"long{i}", deep, own, example=(rows,), slo=SLO)
        before = pool_of(rt, "long0"), rt._tenancy.residents["long0"].host.families
        assert before[0] is None
        stop, wrong, served = threading.Event(), [], []
        want = [np.asarray(jax.jit(deep)(own, rows)) for own in params]

        def client(i: int) -> None:
            while not stop.is_set():
                got = rt.submit(f"long{i}", rows).result(60)
                served.append(i)
                if not np.allclose(got, want[i], rtol=2e-5, atol=2e-6):
                    wrong.append(i)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        rt.add_tenant("urgent", steep, weights(1), example=(row(0),), slo=0.0005)
        host = rt._tenancy.residents["long0"].host
        for _ in range(1200):
            if host.courses[0].pool is not None and before[1][0] not in device_of(rt)._homes:
                break
            threading.Event().wait(0.05)
        count = len(served)
        rt.update_tenant("long1", params[0])  # its place in the bank is another one now, and there is room for that
        rt.update_tenant("long1", params[1])
        stop.set()
        for thread in threads:
            thread.join()
        assert len(host.courses[0].segments) > 1 and set(host.families).isdisjoint(before[1])
        assert count and not [i for i in wrong if i == 0]
        for i in range(2):
            np.testing.assert_allclose(rt.submit(f"long{i}", rows).result(60), want[i], rtol=2e-5, atol=2e-6)
        assert {e.entries[0].family for e in device_of(rt).catalog.executables}.isdisjoint(before[1])


def test_reproducible_results_change_neither_by_a_cut_nor_by_an_executable_of_several_families(monkeypatch):
    """Whoever comes: a tenant who cannot wait for a long program, and one whose program would run with it in less."""
    long, rows = [weights(i, 6, 512) for i in range(2)], np.tile(row(3, 512), (256, 1))
    with checked_runtime(widths=(1, 2), reproducible=True, compiled=False) as rt:
        device, asked = device_of(rt), count_cuts(rt)
        rt.add_tenant("long", deep, long[0], example=(rows,), slo=SLO)
        before = rt.submit("long", rows).result(60)
        rt.add_tenant("urgent", steep, weights(1), example=(row(0),), slo=0.0005)
        rt.add_tenant("late", deep_and_one, long[1], example=(rows,), slo=SLO)
        assert not asked and pool_of(rt, "long") is None and pool_of(rt, "late") is None
        monkeypatch.setattr(device, "apart_ns", lambda entries: 10**12 if len(entries) > 1 else None)
        rt._stations[0].foundry.want(Want((Entry(0, 0, 2), Entry(1, 0, 2))))
        rt.warm_up(120.0)
        assert not device.catalog.mixed
        np.testing.assert_array_equal(rt.submit("long", rows).result(60), before)


def test_a_number_of_segments_is_at_least_one():
    with pytest.raises(InvalidInput, match="segments is 0"):
        Runtime(segments=0)


def test_one_executable_for_two_families_runs_both_and_is_left_out_where_it_takes_longer(monkeypatch):
    with checked_runtime(widths=(1, 2), segments=2, compiled=False) as rt:
        rt.add_tenant("deep", deep, weights(0), example=(row(0),), slo=SLO)
        rt.add_tenant("steep", steep, weights(1), example=(row(0),), slo=SLO)
        rt.warm_up(120.0)
        foundry, device = rt._stations[0].foundry, device_of(rt)
        apart_ns = {True: 10**12, False: 0}
        for wins, segment in ((True, 0), (False, 1)):
            monkeypatch.setattr(device, "apart_ns", lambda entries, ns=apart_ns[wins]: ns if len(entries) > 1 else None)
            entries = (Entry(0, segment, 1), Entry(1, segment, 1))
            foundry.want(Want(entries))
            rt.warm_up(120.0)
            assert any(e.entries == entries for e in device.catalog.executables) == wins
        foundry.want(Want((Entry(0, 0, 1), Entry(0, 1, 1))))  # two segments of one program, which share a pool
        rt.warm_up(120.0)
        assert [e.entries for e in device.catalog.mixed] == [(Entry(0, 0, 1), Entry(1, 0, 1))]
        for i in range(20):
            replies = [rt.submit("deep", row(i)), rt.submit("steep", row(i))]
            assert_right(replies[0].result(60), deep, weights(0), row(i))
            assert_right(replies[1].result(60), steep, weights(1), row(i))
