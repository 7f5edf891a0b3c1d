"""What newcomers cost others: compiling in a process of its own, the garbage that is not looked through, and how soon
the interpreter is handed on."""

import ctypes
import gc
import logging
import math
import operator
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coalesce import jaxpr as J
from coalesce.errors import Shutdown, TraceError
from coalesce.runtime import apart, gil, tenancy
from coalesce.runtime.apart import Apart, exported
from coalesce.runtime.compiler import settings
from coalesce.runtime.gil import BREATH_S, EAGER_S, GIVEN_S, giving_way, handing_on, LATELY_S, NAP_S, STRETCH_S
from coalesce.runtime.runtime import Runtime
from coalesce.runtime.second import Compiler, WANTED
from coalesce.serving import executable, schema
from coalesce.serving.making import Jitted, Recipe
from tests.serving import fit_of, serve

SLO = 30.0


def net(params: Any, x: jax.Array) -> jax.Array:
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def calls_back(params: Any, x: jax.Array) -> jax.Array:
    return jax.pure_callback(lambda v: np.asarray(v) + 1, jax.ShapeDtypeStruct(x.shape, x.dtype), x) @ params[0]


def params_of(seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).standard_normal((3, 8, 8)).astype(np.float32) / 3)


def row(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 8)).astype(np.float32)


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(WANTED, "1")
    yield


def check(rt: Runtime, name: str, fn: Any, seed: int) -> None:
    want = np.asarray(jax.jit(fn)(params_of(seed), row(seed)))
    for reply in [rt.submit(name, row(seed)) for _ in range(6)]:
        np.testing.assert_allclose(reply.result(60), want, rtol=1e-5, atol=1e-6)


def test_who_exports_a_program_takes_apart_what_jax_leaves_of_it():
    """Or whoever serves when garbage is collected next, for all that were exported since."""
    arguments = (jax.ShapeDtypeStruct((2,), jnp.float32),)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)  # a thread of an earlier test may end meanwhile: what is left is not all of it ours
    try:
        before = len(gc.garbage)
        exported(jax.jit(jnp.cos), arguments)
        taken = len(gc.garbage)
        gc.collect()
        found, left = (list(map(what, gc.garbage[i:j])) for i, j in ((before, taken), (taken, None)))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not [name for name in left if "export" in name], "it waits for a collection"
    assert [name for name in found if "export" in name], "JAX leaves nothing any more: this test cannot fail"


def what(x: Any) -> str:
    """The module that a function is of."""
    return str(x.__module__) if isinstance(x, FunctionType) else ""


def doubled(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(net(params, x)) * 2  # a call with derivatives of its own


def test_while_others_are_served_it_is_planned_and_compiled_elsewhere(wanted, caplog, monkeypatch):
    """Also what is cut into segments, whose registers are donated. A compiler that dies is done without."""
    here = list[str]()
    for name in ("PATIENCE_S", "BRIEF_S"):  # however busy this machine is
        monkeypatch.setattr(apart, name, 300.0)

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: here.append(name) or function(*given)

    monkeypatch.setattr(tenancy, "normalise", noting("normalise", tenancy.normalise))
    monkeypatch.setattr(schema, "plan_lanes", noting("plan", schema.plan_lanes))
    monkeypatch.setattr(executable, "plan_lanes", noting("plan", executable.plan_lanes))
    with caplog.at_level(logging.INFO, "coalesce.runtime"), Runtime(widths=(1, 2), segments=2, compiled=False) as rt:
        own = rt._process.apart
        rt.add_tenant("first", net, params_of(0), example=(row(0),), slo=SLO)
        assert own._process is None  # nobody was served meanwhile
        check(rt, "first", net, 0)
        assert {"normalise", "plan"} == set(here)
        here.clear()
        rt.add_tenant("second", doubled, params_of(1), example=(row(0),), slo=SLO)
        rt.warm_up(120.0)
        assert not here
        process = own._process
        assert process is not None and process.poll() is None
        assert not any("where it is served" in r.getMessage() for r in caplog.records)
        check(rt, "first", net, 0)
        check(rt, "second", doubled, 1)
        rt.add_tenant("calls", calls_back, params_of(2), example=(row(0),), slo=SLO)
        assert any("compiled where it is served" in r.getMessage() for r in caplog.records)
        check(rt, "calls", calls_back, 2)
        process.kill()
        rt.add_tenant("third", lambda p, x: net(p, x) + 1, params_of(3), example=(row(0),), slo=SLO)
        assert any("no compiler in a process of its own" in r.getMessage() for r in caplog.records)
        check(rt, "third", lambda p, x: net(p, x) + 1, 3)
        assert {"normalise", "plan"} == set(here)
    assert process.poll() is not None


def test_it_makes_the_same_executable_bit_by_bit_also_where_others_leave_it_no_time(monkeypatch, caplog, tmp_path):
    """It takes what others leave; where they leave nothing, another one takes a little. What the first of them compiled
    is nothing that the second could read from JAX's cache and give away."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    jitted, x = jax.jit(net), row(1)
    structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params_of(0), x))
    own, recipe = Apart(), lambda: Jitted(jitted, structs)

    def check_made() -> subprocess.Popen[bytes]:
        made = own.compile(jax.devices()[0], recipe)
        assert made is not None and own._process is not None
        np.testing.assert_array_equal(made(params_of(0), x), jitted(params_of(0), x))
        return own._process

    try:
        first = check_made()
        assert not own._is_idle or os.sched_getscheduler(first.pid) == os.SCHED_IDLE
        monkeypatch.setattr(apart, "STARVED_S", 0.001)
        monkeypatch.setattr(apart, "processor_s", lambda pid: 0.0)
        own._is_idle = True
        with caplog.at_level(logging.INFO, "coalesce.runtime"):
            assert check_made() is not first and first.poll() is not None
        texts = [r.getMessage() for r in caplog.records]
        assert "<lambda>" in texts[0] and texts[0].startswith("traced where it is served")
        assert [text[:37] for text in texts[1:]] == ["others leave the compiler no time: it"]
        check_left_here(own, recipe, monkeypatch, caplog)
    finally:
        own.close()
    assert own.compile(jax.devices()[0], recipe) is None


def test_what_serves_is_planned_traced_and_lowered_elsewhere_too_to_the_same_executable(monkeypatch):
    """Under the settings that hold here, whatever those of its start were; what raises there raises here."""
    fits = [fit_of(net, params_of(seed), (row(seed),)) for seed in range(2)]
    serving = serve(fits)
    here, own = serving.executable(2), Apart()
    recipe = partial(executable.executable_recipe, (serving.lanes(2),), None)
    traced = list[str]()
    monkeypatch.setattr(executable, "plan_lanes", lambda *_: traced.append("here") or [])
    try:
        made = own.compile(jax.devices()[0], recipe)
        there = replace(here, compiled=made)
        lanes = [(i, (row(i + 5),)) for i in range(2)]
        for got, want in zip(serving.call(there, lanes), serving.call(here, lanes), strict=True):
            np.testing.assert_array_equal(got, want)
        assert not traced
        assert own.call(settings)["jax_enable_x64"] is False
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            told = own.call(settings)
        assert told["jax_enable_x64"] is True and told["jax_default_matmul_precision"] == "highest"
        assert own.call(settings)["jax_default_matmul_precision"] != "highest"
        assert own.call(operator.truediv, 1, 0) is None and own.call(operator.truediv, 1, 2) == 0.5
        assert own.call(lambda: 1) is None
        monkeypatch.setattr(apart, "BRIEF_S", 0.01)
        with own._lock:  # it is at work for somebody else
            assert own.call(operator.truediv, 1, 2) is None
        monkeypatch.setattr(J, "loads", lambda carried, known: [][0])
        assert own.call(operator.truediv, 1, 2) is None
    finally:
        own.close()
    assert own.call(operator.truediv, 1, 2) is None


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here")
def test_a_compiler_that_hangs_keeps_nobody_waiting_for_ever_and_leaves_nothing_behind(monkeypatch, caplog):
    """One that takes what is left is started anew first, as where nothing is left; so is none after `close`."""
    monkeypatch.setattr(apart, "STARVED_S", 0.05)
    monkeypatch.setattr(apart, "STUCK_S", 0.05)
    started, seen = apart.started, list[subprocess.Popen[bytes]]()

    def stopped(idle: bool, platforms: Any) -> subprocess.Popen[bytes]:
        seen.append(started(idle, platforms))
        os.kill(seen[-1].pid, signal.SIGSTOP)
        return seen[-1]

    monkeypatch.setattr(apart, "started", stopped)
    own = Apart()
    with caplog.at_level(logging.INFO, "coalesce.runtime"):
        assert own.call(len, bytes(2**20)) is None  # more than a pipe holds
    assert "it did nothing for 0.05 s" in caplog.text and own.call(operator.truediv, 1, 2) is None
    assert len(seen) == 1 + hasattr(os, "SCHED_IDLE")
    own.close()
    monkeypatch.setattr(apart, "STUCK_S", 60.0)
    monkeypatch.setattr(apart, "STARVED_S", 60.0)
    other, raised = Apart(), list[Exception]()

    def wait() -> None:
        try:
            other.call(operator.truediv, 1, 2)
        except Exception as e:
            raised.append(e)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while other._process is None:
        waiting.join(0.01)
    other.close()
    waiting.join(60)
    assert [type(e) for e in raised] == [Shutdown] and not waiting.is_alive()
    for process in seen:
        with pytest.raises(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)


ECHO = """
import sys

from coalesce.runtime.compiler import read, write

while (request := read(sys.stdin.buffer)) is not None:
    write(sys.stdout.buffer, ("made", request[1]))
"""


@pytest.mark.once
def test_what_an_interrupt_left_unread_is_no_answer_to_the_next_request(monkeypatch):
    right, own = apart.is_starved, Apart()

    def interrupted(*given: Any) -> bool:
        monkeypatch.setattr(apart, "is_starved", right)
        right(*given)  # the answer is there
        raise KeyboardInterrupt

    monkeypatch.setattr(apart, "is_starved", interrupted)
    echo, pipe = [sys.executable, "-c", ECHO], subprocess.PIPE
    monkeypatch.setattr(apart, "started", lambda *_: Compiler(echo, stdin=pipe, stdout=pipe))
    with pytest.raises(KeyboardInterrupt):
        own.call(len, "first")
    assert own.call(len, "second") == (len, ("second",), ())
    own.close()


def test_a_gpu_that_does_not_load_what_it_makes_asks_no_more_but_for_want_of_memory(monkeypatch):
    own, gpu, why = Apart(), SimpleNamespace(platform="gpu", id=0, client=None), ["RESOURCE_EXHAUSTED: out of memory"]

    def unloaded(*_: Any, **__: Any) -> Any:
        raise RuntimeError(why[-1])

    monkeypatch.setattr(J, "dumps", lambda *_: b"")
    monkeypatch.setattr(own, "_answer", lambda *_: (b"", None, None))
    monkeypatch.setattr(apart, "deserialize_and_load", unloaded)
    recipe = partial(Jitted, None, ())
    assert own.compile(gpu, recipe) is None and not own._is_useless
    why.append("it is for another device")
    assert own.compile(gpu, recipe) is None and own._is_useless


def check_left_here(own: Apart, recipe: Recipe, monkeypatch: Any, caplog: Any) -> None:
    """What the other process has no device for, and what does not load."""

    def other(*_: Any, **__: Any) -> Any:
        raise KeyError(0)

    caplog.clear()
    with caplog.at_level(logging.INFO, "coalesce.runtime"):
        assert own.compile(SimpleNamespace(platform="cpu", id=99), recipe) is None
        monkeypatch.setattr(apart, "deserialize_and_load", other)
        assert own.compile(jax.devices()[0], recipe) is None
        assert own.compile(jax.devices()[0], recipe, {"xla_gpu_no_such_option": True}) is None
        assert not own._is_useless
        process = own._process
        assert own.compile(SimpleNamespace(platform="gpu", id=0), recipe) is None
        assert own._is_useless and process is not None and process.poll() is not None
    texts = [r.getMessage() for r in caplog.records if not r.getMessage().startswith("traced")]
    none, cannot, option, useless = texts
    assert "LookupError: there is no device 99" in none and "cannot be loaded: KeyError: 0" in cannot
    assert "xla_gpu_no_such_option" in option
    assert "no compiler in a process of its own" in useless and "gpu" in useless


FACTORS = """
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from coalesce.runtime.apart import Apart
from coalesce.serving.making import Jitted

own, square = Apart(), jax.ShapeDtypeStruct((2, 2), jnp.float32)
own._compile_traced = None  # nothing is lowered here
made = own.compile(jax.devices()[0], partial(Jitted, jnp.linalg.cholesky, (square,)))
own.close()
assert made is not None
np.testing.assert_array_equal(made(4 * np.eye(2, dtype=np.float32)), 2 * np.eye(2))
"""


def test_what_calls_lapack_finds_it_where_nothing_that_does_was_ever_lowered():
    """In a process of its own, which it ended."""
    found = subprocess.run([sys.executable, "-c", FACTORS], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


def test_what_a_process_had_of_the_processor_is_known():
    assert 0 < apart.processor_s(os.getpid()) < math.inf and apart.processor_s(-1) == math.inf


ALONE = """
import gc
from coalesce import Runtime

pythons, usual = gc.get_freeze_count(), gc.get_threshold()
assert pythons < 1000 < len(gc.get_objects())
with Runtime(widths=(1,)):
    assert gc.get_freeze_count() > 1000
    assert gc.get_threshold() == (2000, usual[1], 100)
    with Runtime(widths=(1,)):
        pass
    assert gc.get_freeze_count() > 1000 and gc.get_threshold()[0] == 2000
assert gc.get_threshold() == usual
assert gc.get_freeze_count() <= pythons
gc.freeze()
for own, rare in (
    ((6000, 5, 5), (6000, 5, 100)),
    ((900, 5, 300), (2000, 5, 300)),
    ((6000, 5, 300), (6000, 5, 300)),
    ((0, 5, 5), (0, 5, 5)),
):
    gc.set_threshold(*own)
    with Runtime(widths=(1,)):
        assert gc.get_threshold() == rare
    assert gc.get_threshold() == own
assert gc.get_freeze_count() > 1000, "the process's own"
"""


def test_what_was_there_before_is_not_looked_through_while_somebody_serves():
    """In a process of its own: in this one another test's runtime may be open."""
    subprocess.run([sys.executable, "-c", ALONE], check=True, timeout=120)


AGAIN = """
import gc, weakref
from coalesce.runtime.frozen import OFTEN, SetAside

class Cycle:
    def __init__(self):
        self.own = self

pythons, own = gc.get_freeze_count(), SetAside()
own.again()
own.collect()
assert gc.get_freeze_count() == pythons, "nobody serves"
for _ in range(2):
    gone = weakref.ref(Cycle())
    own.begin()
    assert gone() is None, "it would be set aside, where no collection finds it"
    own.end()
own.begin()
before, kept = gc.get_freeze_count(), [[] for _ in range(5000)]
gone = weakref.ref(Cycle())
own.again()
assert gc.get_freeze_count() > before + 4000
gc.collect()
assert gone() is not None
own.collect()
assert gone() is None and gc.get_freeze_count() > before + 4000
gone = weakref.ref(Cycle())
for _ in range(OFTEN):
    assert gone() is not None
    own.again()
assert gone() is None and gc.get_freeze_count() > before + 4000
gone = weakref.ref(Cycle())
own.again()
gc.unfreeze()
gc.collect()
assert gone() is None
own.again()
assert gc.get_freeze_count() > before + 4000
gc.disable()
before, more = gc.get_freeze_count(), [[] for _ in range(5000)]
own.again()
assert gc.get_freeze_count() <= before, "who looks through nothing"
own.end()
assert gc.get_freeze_count() <= pythons
"""


def test_what_an_executable_leaves_is_looked_through_seldom_and_where_room_is_needed():
    subprocess.run([sys.executable, "-c", AGAIN], check=True, timeout=120)


def test_the_interpreter_is_handed_on_soon_while_a_tenant_is_traced_and_its_programs_are_made():
    """On whatever thread, by several runtimes at once, also where it fails; and no longer than that."""
    usual, seen = sys.getswitchinterval(), list[float]()
    assert usual > 2 * EAGER_S

    def look(params: Any, x: jax.Array) -> jax.Array:
        seen.append(sys.getswitchinterval())
        return net(params, x)

    def raises(params: Any, x: jax.Array) -> jax.Array:
        seen.append(sys.getswitchinterval())
        raise ValueError("not a model")

    with Runtime(widths=(1,), compiled=False) as one, Runtime(widths=(1,), compiled=False) as other:
        one.add_tenant("a", look, params_of(0), example=(row(0),), slo=SLO)
        ready = [rt.add_tenant("b", look, params_of(1), example=(row(0),), slo=SLO, wait=False) for rt in (one, other)]
        for added in ready:
            added.result(60)
        with pytest.raises(TraceError):
            one.add_tenant("c", raises, params_of(2), example=(row(0),), slo=SLO)
        one.update_tenant("a", params_of(3))
        for rt in (one, other):
            rt.warm_up(60.0)
            check(rt, "b", net, 1)
        assert sys.getswitchinterval() == pytest.approx(usual)
    assert len(seen) >= 2 and seen == pytest.approx([EAGER_S] * len(seen))


def test_who_hands_on_last_brings_back_what_was_there():
    usual = sys.getswitchinterval()
    with handing_on():
        with handing_on():
            pass
        assert sys.getswitchinterval() == pytest.approx(EAGER_S)
    assert sys.getswitchinterval() == pytest.approx(usual)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an option of Linux's threads")
def test_timers_of_who_serves_are_exact_while_something_is_made():
    ask, found = 30, list[int]()
    prctl = ctypes.CDLL(None).prctl

    def look() -> None:
        for making in (False, True, False):
            with handing_on() if making else nullcontext():
                handing_on.keep_time()
                found.append(prctl(ask, 0, 0, 0, 0))

    usual = prctl(ask, 0, 0, 0, 0)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [usual, 1, usual] and usual > 1
    assert prctl(ask, 0, 0, 0, 0) == usual, "nobody else's"


class Clock:
    """In place of the module `time`; `at` says what happens after so many naps."""

    def __init__(self, at: dict[int, Callable[[], None]]) -> None:
        self.now_s, self.naps, self.at = 0.0, 0, at

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, s: float) -> None:
        self.now_s += s
        self.naps += 1
        self.at.get(self.naps, lambda: None)()


def test_who_traces_sleeps_while_somebody_serves_but_no_more_than_half_of_the_time(monkeypatch):
    at_work = set[object]()
    clock = Clock({3: at_work.clear})
    monkeypatch.setattr(gil, "time", clock)
    give_way = partial(giving_way(at_work), sys._getframe(), "call", None)
    give_way()
    assert clock.naps == 0  # nobody serves
    at_work.add("driver")
    give_way()
    assert clock.naps == 3 and not at_work  # until that is done
    at_work.add("driver")
    give_way()
    most = clock.naps - 3
    assert clock.now_s == pytest.approx(3 * NAP_S + GIVEN_S, abs=NAP_S)
    give_way()
    assert clock.naps == 3 + most  # its turn
    clock.now_s += GIVEN_S
    give_way()
    assert clock.naps == pytest.approx(3 + 2 * most, abs=1)


def test_who_traces_sleeps_for_a_moment_now_and_then(monkeypatch):
    clock = Clock({})
    monkeypatch.setattr(gil, "time", clock)
    give_way = partial(giving_way(set()), sys._getframe(), "call", None)
    for _ in range(10):
        give_way()
        clock.now_s += 0.6 * STRETCH_S
    assert clock.naps == 4
    assert clock.now_s == pytest.approx(6 * STRETCH_S + 4 * BREATH_S)


def test_an_interrupt_of_who_gives_way_leaves_no_lock_held_and_no_profiler_that_is_gone(monkeypatch):
    """It comes where a Python function begins, as it may without: a lock is left by one of C, which would not run."""

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    always = SimpleNamespace(perf_counter=iter(range(10_000)).__next__, sleep=interrupt, monotonic=lambda: 0.0)
    monkeypatch.setattr(gil, "time", always)
    monkeypatch.setattr(handing_on, "_served_s", 0.0)
    lock, came = threading.Lock(), list[str]()
    with pytest.raises(KeyboardInterrupt), handing_on():
        with lock:
            came.append("locked")
        came.append("left")
        what(came)
        came.append("after")
    assert came == ["locked", "left"] and not lock.locked() and sys.getprofile() is None
    with handing_on():
        profiler = weakref.ref(sys.getprofile())  # pyright: ignore
        sys.setprofile(None)  # as an interrupt does, maybe after Python has looked whom to call
        assert profiler() is not None
    give_way = giving_way(set())

    def __exit__() -> None:
        give_way(sys._getframe(), "call", None)

    __exit__()
    with pytest.raises(KeyboardInterrupt):
        give_way(sys._getframe(), "call", None)


def test_whoever_makes_something_gives_way_where_requests_were_served_lately(monkeypatch):
    profilers = list[Any]()

    def look(params: Any, x: jax.Array) -> jax.Array:
        profilers.append(sys.getprofile())
        return net(params, x)

    monkeypatch.setattr(handing_on, "_served_s", -LATELY_S)
    with Runtime(widths=(1,), compiled=False) as rt:
        rt.add_tenant("a", look, params_of(0), example=(row(0),), slo=SLO)
        assert profilers and not any(profilers)
        check(rt, "a", net, 0)
        profilers.clear()
        rt.add_tenant("b", lambda p, x: look(p, x) + 1, params_of(1), example=(row(0),), slo=SLO)
        assert profilers and all(profilers) and sys.getprofile() is None
        profilers.clear()
        sys.setprofile(own := lambda *_: None)
        try:
            rt.add_tenant("c", lambda p, x: look(p, x) + 2, params_of(2), example=(row(0),), slo=SLO)
            assert set(profilers) == {own} and sys.getprofile() is own  # a profiler of the user's
        finally:
            sys.setprofile(None)
        check(rt, "b", lambda p, x: net(p, x) + 1, 1)
    assert not handing_on._at_work
