"""Programs that are launched without JAX (coalesce/captured.py, coalesce/capture), as far as it goes without a GPU: see
tests/test_gpu_capture.py for one."""

from __future__ import annotations

import threading
import time
from ctypes import c_void_p
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coalesce
from coalesce import staged as staged_module
from coalesce.capture import aside as aside_module, ending
from coalesce.capture.aside import aside_of, check_order, Graph, Line, line_of, place_of, undisturbed
from coalesce.capture.cuda import Cuda, cuda_of, Owned
from coalesce.capture.ending import Around, ends, Recording, TARGET
from coalesce.captured import MOVING
from coalesce.errors import CaptureError, InvalidInput
from coalesce.staged import compile_donating
from tests.fake_graphs import FakeAside, lying_at
from tests.test_staged import programs, requests_of, tenants

GRAPH, STREAM, EXECUTABLE = 77, 5, 99


class Library:
    """Stands for libcuda: notes what is called, and answers `code` to one kind of call."""

    def __init__(self, code: int = 0, to: str = "") -> None:
        self.calls: list[str] = []
        self.code, self.to = code, to

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "cuStreamEndCapture":
                arguments[1]._obj.value = None if self.code else GRAPH
            if name == "cuGraphInstantiateWithFlags":
                arguments[0]._obj.value = EXECUTABLE
            return self.code if name == self.to else 0

        return call


def cuda(code: int = 0, to: str = "") -> tuple[Cuda, list[str]]:
    library = Library(code, to)
    made = Cuda(library, library, 0)
    library.calls.clear()
    return made, library.calls


def test_on_a_cpu_the_same_calls_run_the_compiled_program():
    found = tenants()
    fused = coalesce.fuse(programs(found))
    captured = fused.staged().capture(requests_of(found))
    assert isinstance(captured, coalesce.Captured)
    for got, want in zip(captured().results(), fused(requests_of(found)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    others = [tuple(map(doubled, own)) for own in requests_of(found)]
    assert coalesce.block_until_ready(captured(others)) is captured
    for got, want in zip(captured.results(), fused(others), strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert [[x.shape[0] for x in own] for own in captured.outputs] == [[3, 3, 3], [3]]


def doubled(x: Any) -> Any:
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else 2 * x


def test_results_stay_when_it_is_launched_again():
    captured = one_tenant()
    (first,) = captured().results()
    before = np.array(first)
    captured([(jnp.full((4, 8), 3.0),)]).block_until_ready()
    np.testing.assert_array_equal(first, before)


def test_a_wrong_request_changes_nothing():
    captured = one_tenant()
    (before,) = captured().results()
    with pytest.raises(InvalidInput, match="tenant 'a'"):
        captured([(jnp.ones((4, 9)),)])
    np.testing.assert_array_equal(captured().results()[0], before)


def one_tenant() -> coalesce.Captured:
    program = coalesce.trace(lambda p, x: jnp.tanh(x @ p), jnp.ones((8, 5)) / 8, jnp.ones((4, 8)), name="a")
    return coalesce.fuse([program]).staged().capture([(jnp.ones((4, 8)),)])


def test_a_cpu_has_no_driver_and_no_second_client():
    (device, *_) = jax.devices("cpu")
    assert cuda_of(device) is None
    assert aside_of(device) is None


# As graphs, on a CPU that stands for a GPU


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def aside(monkeypatch, request):
    """Stands for all of a device's; `numbers` are those that were asked for."""
    made = FakeAside(late=request.param)
    monkeypatch.setattr(staged_module, "aside_of", lambda device, number: made.numbered(number))
    return made


def test_a_graph_gives_what_a_call_does(aside):
    found = tenants()
    fused = coalesce.fuse(programs(found))
    captured = fused.staged().capture(requests_of(found))
    others = [tuple(map(doubled, own)) for own in requests_of(found)]
    for requests in (requests_of(found), others, requests_of(found)):
        for got, want in zip(captured(requests).results(), fused(requests), strict=True):
            jax.tree.map(np.testing.assert_array_equal, got, want)
    assert aside.captured == 1 and aside.library.calls.count("cuGraphLaunch") == 3


def test_branches_write_all_results(aside):
    x, p = jnp.arange(12.0).reshape(3, 4), jnp.ones((4, 4)) / 3
    functions = [lambda p, x: jnp.tanh(x @ p), lambda p, x: jnp.tanh(x @ p @ p) - x, lambda p, x: (x @ p) * 2]
    found = [coalesce.trace(fn, p, x, name=f"t{i}") for i, fn in enumerate(functions)]
    fused = coalesce.fuse(found, platform="gpu", policy="never", side_by_side=True, tuned=False)
    captured = fused.staged().capture([(x,)] * 3)
    assert aside.captured == len(functions) and aside.numbers == [0, 1, 2]  # with memory of its own each
    for fn, got in zip(functions, captured().results(), strict=True):
        np.testing.assert_allclose(got, fn(p, x), rtol=1e-5)
    for fn, got in zip(functions, captured([(x + 1,)] * 3).results(), strict=True):
        np.testing.assert_allclose(got, fn(p, x + 1), rtol=1e-5)


def test_one_thing_may_be_given_back_twice(aside):
    """XLA copies it, which has to be a part of the graph."""
    x, p = jnp.arange(12.0).reshape(3, 4), jnp.ones((4, 4)) / 3
    staged = coalesce.fuse([coalesce.trace(lambda p, x: (x @ p, x @ p, jnp.arange(3)), p, x, name="a")]).staged()
    captured = staged.capture([(x,)])
    for y in (x, x + 1):
        ((first, second, numbers),) = captured([(y,)]).results()
        np.testing.assert_allclose(first, y @ p, rtol=1e-5)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(numbers, np.arange(3))


def test_who_gives_back_what_it_got_does_so_or_there_is_no_graph(aside):
    """It shares no kernel with anybody. XLA for CPUs copies it behind everything else, for GPUs before."""
    x, p = jnp.arange(12.0).reshape(3, 4), jnp.ones((4, 4)) / 3
    functions = [lambda p, x: jnp.tanh(x @ p), lambda p, x: x]
    found = [coalesce.trace(fn, p, x, name=f"t{i}") for i, fn in enumerate(functions)]
    staged = coalesce.fuse(found, platform="gpu", policy="never", side_by_side=True, tuned=False).staged()
    try:
        captured = staged.capture([(x,)] * 2)
    except CaptureError as e:
        assert "behind its end" in str(e)
        return
    np.testing.assert_array_equal(captured([(x + 1,)] * 2).results()[1], x + 1)


def test_requests_on_the_host_are_brought_by_the_device(aside):
    """Each is written where no round before it is still read from."""

    def fn(p, x, n, flag):
        return jnp.where(flag, x @ p, x * n.astype(jnp.float32)), n + 1

    def request(i: int) -> tuple[Any, ...]:
        x = np.random.default_rng(i).standard_normal((2, 3), np.float32)
        return x, np.int32(i), np.array([i % 2 == 0, True, False])

    p = np.eye(3, dtype=np.float32) * 2
    found = [coalesce.trace(fn, p, *request(0), name=name) for name in "ab"]
    captured = coalesce.fuse(found).staged().capture([request(0), request(1)])
    copies = aside.library.calls.count("cuMemcpyAsync")
    for i in range(5):
        given = [request(i), request(i + 7)]
        captured(given)
        if i % 2:
            continue  # the next one comes before anybody has waited
        for x, (y, n) in zip(given, captured.results(), strict=True):
            np.testing.assert_allclose(y, fn(p, *map(jnp.asarray, x))[0], rtol=1e-6)
            assert n == x[1] + 1
    assert aside.library.calls.count("cuMemcpyAsync") == copies + 5 * 3
    assert aside.numbers == [0]
    moved = [tuple(map(jnp.asarray, request(3))), request(4)]  # one of them lies on the device
    for x, (y, _) in zip(moved, captured(moved).results(), strict=True):
        np.testing.assert_allclose(y, fn(p, *map(jnp.asarray, x))[0], rtol=1e-6)


def test_no_request_is_written_over_another(aside):
    """Rounds that nobody waits for: what each of them reads is looked at in its place among them."""
    traced = coalesce.trace(lambda p, x: x * p, np.float32(2), np.ones(3, np.float32), name="a")
    captured = coalesce.fuse([traced]).staged().capture([(np.ones(3, np.float32),)])
    ((out,),) = captured._running._outputs  # pyright: ignore
    seen, stream = [], aside.line.stream
    for i in range(5):
        captured([(np.full(3, i, np.float32),)])
        aside.library.soon(stream, lambda: seen.append(float(lying_at(place_of(out)).ravel()[0])))
    captured.block_until_ready()
    assert seen == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_what_nobody_waits_for_does_not_pile_up(aside):
    captured = (
        coalesce.fuse([coalesce.trace(lambda p, x: x * p, 2.0, jnp.ones(3), name="a")])
        .staged()
        .capture([(jnp.ones(3),)])
    )
    for i in range(3 * MOVING):
        captured([(jnp.full(3, float(i)),)])
        assert len(captured._running._moving) <= MOVING + 1  # pyright: ignore
    np.testing.assert_array_equal(captured.results()[0], np.full(3, 2.0 * (3 * MOVING - 1)))


def test_it_is_waited_for_before_its_memory_goes(aside):
    captured = (
        coalesce.fuse([coalesce.trace(lambda p, x: x * p, 2.0, jnp.ones(3), name="a")])
        .staged()
        .capture([(jnp.ones(3),)])
    )
    captured()
    assert bool(aside.library.queue) == aside.library.late
    del captured
    assert not aside.library.queue


def test_it_can_be_forbidden(monkeypatch):
    driver, _ = cuda()
    monkeypatch.setattr(aside_module, "cuda_of", lambda device: driver)
    monkeypatch.setattr(aside_module, "lines", {})
    monkeypatch.setattr(aside_module, "asides", {})
    device = object()
    made = aside_of(device)
    assert made is not None and aside_of(device) is made and aside_of(device, 1) is not made
    assert line_of(device) is made.line
    monkeypatch.setenv("COALESCE_CAPTURE", "0")
    assert aside_of(device) is made  # as it was when it was first asked for
    other = object()
    assert aside_of(other) is None and line_of(other) is None
    monkeypatch.delenv("COALESCE_CAPTURE")
    assert aside_of(other) is None


def test_a_device_without_memory_for_a_stream_is_left_to_jax(monkeypatch):
    driver, _ = cuda(2, "cuStreamCreate")
    monkeypatch.setattr(aside_module, "cuda_of", lambda device: driver)
    monkeypatch.setattr(aside_module, "lines", {})
    assert line_of(object()) is None


# What XLA calls: on a CPU the end of a program too (tests/fake_graphs.py), but nothing before it


def compiled(into: int = 1) -> Any:
    given = jnp.ones((4, 4)), [jnp.zeros((4, 4))] * into
    return compile_donating(ends(lambda x, _: [x @ x + i for i in range(into)]), given, {})


def test_a_program_that_ends_so_computes_what_it_did():
    result, _ = compiled()(jnp.ones((4, 4)), [jnp.zeros((4, 4))])
    np.testing.assert_array_equal(result, np.full((4, 4), 4.0))


def test_the_last_call_ends_a_capture():
    driver, calls = cuda()
    run = compiled()
    with Recording(driver) as recording:
        recording.begin(STREAM)
        jax.block_until_ready(run(jnp.ones((4, 4)), [jnp.zeros((4, 4))]))
        assert calls == ["cuStreamBeginCapture_v2", "cuStreamEndCapture"]
    assert recording.graph is not None and recording.graph.value == GRAPH
    assert recording.error is None
    calls.clear()
    run(jnp.ones((4, 4)), [jnp.zeros((4, 4))])
    assert not calls  # of no recording


def test_it_runs_behind_everything_else():
    check_order(compiled(3))


def test_nothing_may_run_behind_it():
    made = compiled()
    text = made.as_text()
    end = next(line for line in text.splitlines() if TARGET in line)
    late = text.replace(end, f"{end}\n  %late = f32[4,4]{{1,0}} add(%a, %a)")
    with pytest.raises(CaptureError, match="behind its end: %late"):
        check_order(Text(late))
    with pytest.raises(CaptureError, match="in which order"):
        check_order(Text(text.replace("is_scheduled=true", "")))
    with pytest.raises(CaptureError, match="in which order"):
        check_order(Text(text.replace(TARGET, "another")))


class Text:
    def __init__(self, text: str) -> None:
        self.text = text

    def as_text(self) -> str:
        return self.text


def test_ctrl_c_is_for_who_waits():
    """XLA calls Python on the thread that captures: never the main one."""
    driver, seen = cuda()[0], []

    def capture() -> Owned:
        seen.append(threading.current_thread().name)
        return owned(driver, GRAPH)

    undisturbed(capture)
    assert seen == ["coalesce-capture"]
    with pytest.raises(CaptureError, match="no"):
        undisturbed(refuse)


def refuse() -> Owned:
    time.sleep(0.05)  # who waits does so by then
    raise CaptureError("no")


# A capture that fails


def test_a_capture_that_cannot_begin_is_none():
    driver, calls = cuda(900, "cuStreamBeginCapture_v2")
    with Recording(driver) as recording:
        assert not recording.begin(STREAM)  # so XLA is told to run nothing
        recording.end()
    assert calls == ["cuStreamBeginCapture_v2"]
    assert recording.graph is None and "error 900" in str(recording.error)


def test_xla_runs_nothing_where_a_capture_does_not_begin():
    """What the program reads may not be there. On a CPU what begins a capture is called in the program's place."""
    stages = {"execute": jax.ffi.pycapsule(ending.initialize)}
    jax.ffi.register_ffi_target("coalesce_capture_that_begins", stages, platform="cpu")
    call = jax.ffi.ffi_call("coalesce_capture_that_begins", jax.ShapeDtypeStruct((1,), jnp.uint32))
    run = jax.jit(lambda x: call(x + 1)).lower(jnp.ones(3)).compile()
    jax.block_until_ready(run(jnp.ones(3)))  # of no recording
    driver, calls = cuda(900, "cuStreamBeginCapture_v2")
    with Recording(driver), pytest.raises((ValueError, RuntimeError), match="the capture did not begin"):
        jax.block_until_ready(run(jnp.ones(3)))
    assert calls == ["cuStreamBeginCapture_v2"]


def test_a_stream_is_not_left_capturing():
    """A program that fails never comes to its end."""
    driver, calls = cuda(901, "cuStreamEndCapture")
    with pytest.raises(ValueError, match="the program"), Recording(driver) as recording:
        recording.begin(STREAM)
        raise ValueError("the program")
    assert calls == ["cuStreamBeginCapture_v2", "cuStreamEndCapture"]
    assert recording.graph is None and "error 901" in str(recording.error)
    with Recording(driver):
        pass  # the next one has its turn


def test_one_is_recorded_at_a_time():
    driver, _ = cuda()
    seen, entered = [], threading.Event()

    def other() -> None:
        with Recording(driver):
            entered.set()
            seen.append("other")

    with Recording(driver):
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.05)
        seen.append("first")
    thread.join()
    assert seen == ["first", "other"] and entered.is_set()
    assert Recording.now is None


def test_what_is_copied_around_a_program_is_part_of_it():
    driver, calls = cuda()
    with Recording(driver, Around([(1, 2, 3)], [(4, 5, 6), (7, 8, 9)])) as recording:
        assert recording.begin(STREAM)
        calls.append("the program")
        recording.end()
    begin, copy, end = "cuStreamBeginCapture_v2", "cuMemcpyAsync", "cuStreamEndCapture"
    assert calls == [begin, copy, "the program", copy, copy, end]
    assert recording.error is None


# Graphs


def test_several_that_run_at_once_are_one_graph():
    driver, calls = cuda()
    graph = Graph(Line(driver), [owned(driver, 1), owned(driver, 2)], None)
    assert calls.count("cuGraphAddChildGraphNode") == 2
    assert calls.count("cuGraphDestroy") == 3  # none is needed any more
    calls.clear()
    graph.launch()
    assert calls == ["cuCtxPushCurrent_v2", "cuGraphLaunch", "cuCtxPopCurrent_v2"]
    calls.clear()
    del graph
    assert calls == ["cuCtxPushCurrent_v2", "cuGraphExecDestroy", "cuCtxPopCurrent_v2"]


def owned(driver: Cuda, number: int) -> Owned:
    return Owned(driver, "cuGraphDestroy", c_void_p(number))


def test_a_graph_that_cannot_be_made_is_a_capture_that_failed():
    driver, calls = cuda(2, "cuGraphInstantiateWithFlags")
    with pytest.raises(CaptureError, match="error 2"):
        Graph(Line(driver), [owned(driver, 1), owned(driver, 2)], None)
    assert calls.count("cuGraphDestroy") == 3  # also of the one that was to hold both


def test_a_launch_that_fails_says_so():
    driver, calls = cuda(700, "cuGraphLaunch")
    graph = Graph(Line(driver), [owned(driver, 1)], None)
    assert "cuGraphAddChildGraphNode" not in calls
    with pytest.raises(RuntimeError, match="cuGraphLaunch with error 700"):
        graph.launch()
