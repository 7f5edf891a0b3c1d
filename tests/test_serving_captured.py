"""Executables that are launched without JAX give each lane what it gets alone; on a CPU, which stands for a GPU."""

from __future__ import annotations

import dataclasses
from concurrent.futures import wait
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coalesce
from coalesce import jaxpr as J
from coalesce.capture.aside import check_order
from coalesce.capture.cuda import NOT_READY
from coalesce.capture.ending import Recording
from coalesce.runtime import device as device_module
from coalesce.runtime.bundle import Bundle
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.commands import Want
from coalesce.serving import seats as seats_module, store as store_module
from coalesce.serving.captured import captured_recipe, CapturedExecutable, Capturing, lost, may_capture, SEATS
from coalesce.serving.executable import Executable
from coalesce.serving.making import make_here, told, WITHOUT_GRAPH
from coalesce.serving.store import Preparer
from tests.alone import array
from tests.fake_graphs import FakeAside
from tests.serving import assert_alone, CPU, fit_of, results, serve, Serving
from tests.serving_models import tenants


def captured_of(served: Serving, late: bool = False) -> tuple[CapturedExecutable, FakeAside]:
    aside = FakeAside(late=late)
    made = Capturing(lambda _: aside).made([served.lanes(2)])
    assert isinstance(made, CapturedExecutable)
    return made, aside


def served(name: str, count: int = 3) -> tuple[Serving, list[Any]]:
    found = tenants(name, count)
    return serve([fit_of(fn, p, x) for fn, p, x in found]), found


def called(serving: Serving, executable: Any, lanes: list[int], found: list[Any]) -> list[Any]:
    """What each lane's tenant gets; what was staged is given back, as the runtime does."""
    filled = executable.stage([[serving.lane(t, found[t][2]) for t in lanes]])
    (stacks,) = executable.fetch(executable.run([serving.store.bank], [None], filled))
    executable.take_back(filled)
    return [results(serving.fits[t], [x[i] for x in stacks]) for i, t in enumerate(lanes)]


@pytest.mark.parametrize("name", ["mlp", "mixed"])
def test_lanes_get_what_they_get_alone(name):
    serving, found = served(name)
    executable, aside = captured_of(serving)
    for lanes in ([0, 1], [2, 0], [1], [2, 2], [0]):
        for got, t in zip(called(serving, executable, lanes, found), lanes, strict=True):
            assert_alone(got, found[t])
    assert aside.library.calls.count("cuGraphLaunch") == 5


@pytest.mark.parametrize("late", [False, True])
def test_families_that_share_an_executable_are_branches(late):
    """Each is the program that it is alone, which is compiled once."""
    each = [served("mlp"), served("lstm"), served("mixed")]
    aside, made = FakeAside(late=late), []
    capturing = Capturing(aside.numbered)

    def make(recipe: Any) -> Any:
        made.append(recipe)
        return make_here(recipe)

    alone = capturing.made([each[0][0].lanes(2)], make)
    together = capturing.made([serving.lanes(2) for serving, _ in each], make)
    assert isinstance(together, CapturedExecutable) and len(made) == 3
    assert aside.numbers == [0, 1, 2]  # what they compute on the way lies apart
    lanes = [[1, 0], [2], [0, 1]]

    def staged(executable: Any) -> Any:
        given = zip(each, lanes, strict=True)
        return executable.stage([[s.lane(t, found[t][2]) for t in own] for (s, found), own in given])

    filled = [staged(together) for _ in range(SEATS + 1)]  # the last one finds no seat
    banks = [serving.store.bank for serving, _ in each]
    outputs = [together.run(banks, [None] * 3, own) for own in filled]
    assert aside.library.calls.count("cuGraphLaunch") == SEATS
    assert aside.library.calls.count("cuMemcpyAsync") == 2 * SEATS  # one each way, for all of them
    for own, out in zip(filled, outputs, strict=True):
        together.send_back(out)
        stacks = together.fetch(out)
        assert together.looks(out)()
        together.take_back(own)
        for (serving, found), ran, stack in zip(each, lanes, stacks, strict=True):
            for i, t in enumerate(ran):
                assert_alone(results(serving.fits[t], [y[i] for y in stack]), found[t])
    assert len(together.free) == SEATS
    (got,) = called(each[0][0], alone, [2], each[0][1])
    assert_alone(got, each[0][1][2])


def test_what_was_fetched_stays():
    serving, found = served("mlp")
    executable, _ = captured_of(serving)
    (first,) = called(serving, executable, [0], found)
    for _ in range(2 * SEATS):
        called(serving, executable, [1, 2], found)
    assert_alone(first, found[0])


def test_a_seat_is_taken_until_it_is_given_back():
    """And who finds none is served as JAX serves."""
    serving, found = served("mlp")
    executable, aside = captured_of(serving)
    filled = [executable.stage([[serving.lane(t % 3, found[t % 3][2])]]) for t in range(SEATS + 1)]
    assert not executable.free
    assert [own.seat is None for own in filled] == [False] * SEATS + [True]
    outputs = [executable.run([serving.store.bank], [None], own) for own in filled]
    assert aside.library.calls.count("cuGraphLaunch") == SEATS
    for t, (own, out) in enumerate(zip(filled, outputs, strict=True)):
        executable.send_back(out)
        (stacks,) = executable.fetch(out)
        assert_alone(results(serving.fits[t % 3], [x[0] for x in stacks]), found[t % 3])
        executable.take_back(own)
    assert len(executable.free) == SEATS


@pytest.mark.parametrize("little", [0, 2**20])
def test_what_is_brought_is_there_when_it_is_read(little, monkeypatch):
    """On a stream of its own, or as a part of the graph."""
    monkeypatch.setattr(seats_module, "LITTLE", little)
    serving, found = served("mlp")
    executable, aside = captured_of(serving, late=True)
    for lanes in ([0, 1], [2], [1, 0], [2, 2], [0]):
        for got, t in zip(called(serving, executable, lanes, found), lanes, strict=True):
            assert_alone(got, found[t])
    assert ("cuStreamWaitEvent" in aside.library.calls) == (little == 0)


def test_on_a_gpu_too_a_bundle_that_is_done_at_once_is_at_hand():
    """What it leaves lies on the host; what JAX leaves has to be asked for."""
    serving, found = served("mlp")
    executable, aside = captured_of(serving, late=True)
    gpu = SimpleNamespace(platform="gpu")
    filled = executable.stage([[serving.lane(0, found[0][2])]])
    outputs = executable.run([serving.store.bank], [None], filled)
    bundle = Bundle(gpu, executable, [None], filled, outputs, [[]])
    aside.library.codes["cuEventQuery"] = NOT_READY
    assert not bundle.is_at_hand(0.0) and not bundle.is_at_hand(0.01)
    aside.library.codes.clear()
    assert bundle.is_at_hand(0.0)
    bundle.wait()
    assert len(executable.free) == SEATS
    executable.free.clear()
    called_by_jax = executable.run([serving.store.bank], [None], executable.stage([[serving.lane(0, found[0][2])]]))
    assert not Bundle(gpu, executable, [None], filled, called_by_jax, [[]]).is_at_hand(0.0)


def test_as_jax_calls_it_nobody_else_is_captured_meanwhile():
    serving, found = served("mlp")
    executable, _ = captured_of(serving)
    made = executable._parts[0].made
    compiled, held = made.compiled, []

    def call(*given: Any) -> Any:
        held.append(Recording.alone.locked())
        return compiled(*given)

    made.compiled = call
    executable.free.clear()
    (got,) = called(serving, executable, [1], found)
    assert_alone(got, found[1])
    assert held == [True] and not Recording.alone.locked()


def test_a_bank_that_has_moved_is_captured_anew():
    serving, found = served("mlp", 2)
    executable, aside = captured_of(serving)
    executable.make_ready([serving.store.bank])
    assert aside.captured == 1 + SEATS  # one of no bank, which shows that it can be
    executable.make_ready([serving.store.bank])
    assert aside.captured == 1 + SEATS
    serving.store.bank[:] = [jnp.array(x) for x in serving.store.bank]
    for got, t in zip(serving.call(executable, [(0, found[0][2]), (1, found[1][2])]), (0, 1), strict=True):
        assert_alone(got, found[t])
    assert aside.captured == 2 + SEATS


def test_inputs_that_cannot_be_staged_leave_the_seat():
    serving, found = served("mlp")
    executable, _ = captured_of(serving)
    good = serving.lane(0, found[0][2])
    with pytest.raises(ValueError):
        executable.stage([[good._replace(inputs=[np.ones(99, np.float32)] * len(good.inputs))]])
    assert len(executable.free) == SEATS
    (got,) = serving.call(executable, [(0, found[0][2])])
    assert_alone(got, found[0])


def test_what_cannot_be_captured_is_called_as_jax_does():
    serving, found = served("mlp")
    aside = FakeAside("it looks at a value")
    capturing = Capturing(lambda _: aside)
    made = capturing.made([serving.lanes(2)])
    assert type(made) is Executable
    aside.refuses = ""
    assert type(capturing.made([serving.lanes(1)])) is Executable  # it is not tried again
    (got,) = serving.call(made, [(0, found[0][2])])
    assert_alone(got, found[0])


def test_one_that_cannot_be_captured_again_is_called_as_jax_does(caplog):
    serving, found = served("mlp")
    executable, aside = captured_of(serving)
    aside.refuses = "no memory"
    (got,) = serving.call(executable, [(0, found[0][2])])
    assert_alone(got, found[0])
    assert "no memory" in caplog.text
    assert not aside.library.calls.count("cuGraphLaunch")
    aside.refuses = ""
    for _ in range(2 * SEATS):
        (got,) = called(serving, executable, [0], found)
        assert_alone(got, found[0])
    assert len(executable.free) == SEATS - 1  # that seat is not tried again


def test_a_call_that_failed_frees_its_seat_when_it_has_ended():
    serving, found = served("mlp")
    executable, aside = captured_of(serving)
    executable.make_ready([serving.store.bank])
    filled = executable.stage([[serving.lane(0, found[0][2])]])
    aside.library.broken = "cuGraphLaunch"
    with pytest.raises(RuntimeError, match="error 700"):
        executable.run([serving.store.bank], [None], filled)
    aside.library.broken = "cuStreamSynchronize"
    executable.take_back_failed(filled)
    assert len(executable.free) == SEATS - 1 and lost.pop() is filled  # what it did is not known
    aside.library.broken = ""
    other = executable.stage([[serving.lane(0, found[0][2])]])
    executable.take_back_failed(other)
    assert len(executable.free) == SEATS - 1


def test_a_launch_that_fails_half_way_is_waited_for():
    serving, found = served("mlp")
    executable, aside = captured_of(serving, late=True)
    filled = executable.stage([[serving.lane(0, found[0][2])]])
    aside.library.broken = "cuEventRecord"
    with pytest.raises(RuntimeError, match="error 700"):
        executable.run([serving.store.bank], [None], filled)
    assert aside.library.queue  # its graph was launched
    executable.take_back_failed(filled)
    assert not aside.library.queue and len(executable.free) == SEATS


def test_what_cannot_be_compiled_so_is_compiled_as_ever():
    serving, found = served("mlp")

    def make(recipe: Any) -> Any:
        jitted = recipe()
        if jitted.captured:
            raise RuntimeError("RESOURCE_EXHAUSTED: not so")
        return make_here(recipe)

    made = Capturing(lambda _: FakeAside()).made([serving.lanes(2)], make)
    assert type(made) is Executable
    (got,) = serving.call(made, [(0, found[0][2])])
    assert_alone(got, found[0])


@pytest.mark.parametrize("broken", ["cuMemAlloc_v2", "cuMemHostAlloc", "cuGraphInstantiateWithFlags"])
def test_without_memory_it_is_called_as_jax_does(broken):
    serving, found = served("mlp")
    aside = FakeAside()
    aside.library.broken, capturing = broken, Capturing(lambda _: aside)
    made = capturing.made([serving.lanes(2)])
    assert type(made) is Executable and not aside.library.memory
    (got,) = serving.call(made, [(0, found[0][2])])
    assert_alone(got, found[0])
    aside.library.broken = ""
    again = capturing.made([serving.lanes(1)])
    assert (type(again) is Executable) == (broken == "cuGraphInstantiateWithFlags")  # may be the program's fault


def test_a_bank_is_written_to_when_who_reads_it_has_ended(monkeypatch):
    """Graphs that run when somebody waits for them: who wrote without would change what they read."""
    aside = FakeAside(late=True)
    monkeypatch.setattr(store_module, "line_of", lambda device: aside.line)
    fn, p, x = tenants("mlp", 1)[0]
    _, other, _ = tenants("mlp", 2)[1]
    fits = [fit_of(fn, p, x), fit_of(fn, other, x)]
    serving = serve(fits[:1], capacity=1, options=dataclasses.replace(CPU, captured=True))
    made = Capturing(lambda _: aside).made([serving.lanes(1)])
    filled = made.stage([[serving.lane(0, x)]])
    outputs = made.run([serving.store.bank], [None], filled)
    assert aside.library.queue
    serving.store.write(0, Preparer(serving.schema)(fits[1]))
    (stacks,) = made.fetch(outputs)
    assert_alone(results(fits[0], [y[0] for y in stacks]), (fn, p, x))
    made.take_back(filled)
    (stacks,) = made.fetch(made.run([serving.store.bank], [None], made.stage([[serving.lane(0, x)]])))
    assert_alone(results(fits[1], [y[0] for y in stacks]), (fn, other, x))


def test_memory_is_given_back():
    serving, found = served("mlp")
    executable, aside = captured_of(serving)
    serving.call(executable, [(0, found[0][2])])
    assert aside.library.memory
    del executable
    assert not aside.library.memory


def until(p: Any, x: Any) -> Any:
    return jax.lax.while_loop(lambda c: jnp.sum(c) < 10, lambda c: c @ p + 1, x)


def test_neither_loops_that_look_at_a_value_nor_cut_programs_are_tried():
    whole, _ = served("mlp")
    assert may_capture([whole.lanes(2)])
    loop = serve([fit_of(until, jnp.eye(3), (array(2, 3),))])
    assert not may_capture([loop.lanes(1)])
    cut = serve([fit_of(lambda p, x: jnp.tanh(jnp.tanh(x @ p) @ p), array(6, 6), (array(2, 6),))], segments=2)
    assert not may_capture([cut.lanes(1)])
    as_it_is = dataclasses.replace(CPU, as_it_is=True)
    alone = serve([fit_of(lambda p, x: x @ p, array(6, 6), (array(2, 6),))], options=as_it_is)
    assert not may_capture([alone.lanes(1)])


# Behind a runtime


@pytest.fixture
def runtime_on(monkeypatch):
    """A runtime whose CPU has CUDA graphs."""

    def make(aside: FakeAside, **options: Any) -> coalesce.Runtime:
        monkeypatch.setattr(device_module, "aside_of", lambda device, number: aside)
        monkeypatch.setattr(store_module, "line_of", lambda device: aside.line)
        return coalesce.Runtime(widths=(1, 2, 4), **options)

    return make


def scorer(p: Any, x: Any) -> Any:
    return {"y": jnp.tanh(x @ p["w"]) @ p["v"], "sum": jnp.sum(x)}


def weights(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((6, 8), np.float32), "v": rng.standard_normal((8, 3), np.float32)}


def same(got: Any, p: Any, x: Any) -> None:
    want = jax.jit(scorer)(p, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_tenants_come_change_and_go(runtime_on):
    aside = FakeAside()
    held = {f"t{i}": weights(i) for i in range(6)}
    x = np.random.default_rng(9).standard_normal((2, 6), np.float32)
    with runtime_on(aside, capacity=2) as rt:
        for name, p in held.items():  # the bank grows twice
            rt.add_tenant(name, scorer, p, example=(x,), slo=30.0)
        rt.warm_up()
        futures = [(name, rt.submit(name, x + i)) for i in range(8) for name in held]
        wait([future for _, future in futures])
        for i, (name, future) in enumerate(futures):
            same(future.result(), held[name], x + i // len(held))
        held["t1"] = weights(77)
        rt.update_tenant("t1", held["t1"])
        rt.remove_tenant("t0")
        for name in ("t1", "t5"):
            same(rt.submit(name, x).result(), held[name], x)
        assert rt.health().ok and not rt.health().failed
    calls = aside.library.calls
    assert calls.count("cuGraphLaunch") >= 10
    assert calls.count("cuStreamSynchronize") >= 6  # before a bank is written to


def test_where_kernels_stay_the_same_nothing_is_captured(runtime_on):
    aside = FakeAside()
    x = np.ones((2, 6), np.float32)
    with runtime_on(aside, reproducible=True) as rt:
        rt.add_tenant("a", scorer, weights(0), example=(x,), slo=30.0)
        same(rt.submit("a", x).result(), weights(0), x)
    assert not aside.captured


def test_a_device_that_fails_ends_what_runs_there(runtime_on):
    aside = FakeAside()
    x = np.ones((2, 6), np.float32)
    with runtime_on(aside) as rt:
        rt.add_tenant("a", scorer, weights(0), example=(x,), slo=30.0)
        rt.warm_up()
        aside.library.broken = "cuGraphLaunch"
        with pytest.raises(coalesce.TenantFailure):  # the device itself still answers JAX
            rt.submit("a", x).result()
        aside.library.broken = ""
        same(rt.submit("a", x).result(), weights(0), x)


def test_families_that_wait_for_each_other_share_a_graph(runtime_on, monkeypatch):
    aside = FakeAside()
    x = np.ones((2, 6), np.float32)

    def other(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["w"] * 2) @ p["v"]

    with runtime_on(aside) as rt:
        rt.add_tenant("a", scorer, weights(0), example=(x,), slo=30.0)
        rt.add_tenant("b", other, weights(1), example=(x,), slo=30.0)
        station = rt._stations[0]
        monkeypatch.setattr(station.device, "apart_ns", lambda entries: None)  # it wins, whatever it takes here
        station.foundry.want(Want((Entry(0, 0, 2), Entry(1, 0, 2))))
        rt.warm_up(60.0)
        (mixed,) = station.device.catalog.mixed
        executable = station.device._loaded[mixed.id].executable
        assert isinstance(executable, CapturedExecutable) and len(executable.free) == SEATS
        futures = [rt.submit(name, x + i) for i in range(40) for name in "ab"]
        wait(futures)
        for i, future in enumerate(futures):
            p, fn = (weights(1), other) if i % 2 else (weights(0), scorer)
            want = jax.jit(fn)(p, x + i // 2)
            jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-5), future.result(), want)


def test_a_recipe_is_carried_to_the_compilers_process():
    serving, found = served("mlp")
    own = serving.lanes(2)
    jitted = J.loads(J.dumps(partial(captured_recipe, own._replace(schema=own.schema.bank))))()
    assert jitted.captured and told(jitted, None) == WITHOUT_GRAPH == told(jitted, {}) != told(jitted, {"a": 1})
    made = make_here(lambda: jitted)
    check_order(made)
    given, into = (np.zeros(jitted.arguments[1].shape, jitted.arguments[1].dtype), jitted.arguments[2])
    *results_, _ = made([serving.store.bank], given, [np.zeros(s.shape, s.dtype) for s in into])
    assert [x.shape for x in results_] == [s.shape for s in into]
