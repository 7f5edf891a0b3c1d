"""Compilers that fail or stall, executables that find no memory, too many of them, other devices, caches on disk.

With programs whole and in three segments; all decisions are checked.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from coalesce.errors import CompileError, DeviceError, InvalidInput, OutOfDeviceMemory, TenantFailure
from coalesce.runtime import foundry
from coalesce.runtime.bundle import Bundle
from coalesce.runtime.device import Device
from coalesce.runtime.runtime import Runtime
from coalesce.scheduler.catalog import Entry
from coalesce.serving.executable import Executable
from tests.checked import checked_runtime
from tests.memory import held_from_now

SLO = 30.0
in_segments = pytest.mark.parametrize("segments", [1, pytest.param(3, marks=pytest.mark.once)])


def add(w: Any, x: Any) -> Any:
    return (w + x) * 2 - x - w  # exactly so, and there is something to cut


def times(w: Any, x: Any) -> Any:
    return w * x + x - x


def vector(value: float) -> np.ndarray:
    return np.full(4, value, np.float32)


def serve(rt: Runtime, name: str, fn: Callable[..., Any] = add, weight: float = 1.0) -> None:
    rt.add_tenant(name, fn, vector(weight), example=(vector(0),), slo=SLO)


def widths_of(rt: Runtime) -> list[int]:
    return sorted(e.entries[0].width for e in rt._stations[0].device.catalog.executables)


Compile = Callable[[Device, Any, Any], Any]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """`compiler(before)` has `before(entries)` called ahead of each compilation; it may raise, or take its time."""
    right: Compile = Device.compile

    def put_before(before: Callable[[Any], None]) -> None:
        def compile(self: Device, entries: Any, capacities: Any) -> Any:
            before(entries)
            return right(self, entries, capacities)

        monkeypatch.setattr(Device, "compile", compile)

    return put_before


@in_segments
def test_what_cannot_be_compiled_is_done_without_and_remembered(compiler, segments: int):
    tried: list[int] = []

    def before(entries: Any) -> None:
        tried.append(entries[0].width)
        if entries[0].width > 2:
            raise RuntimeError("too wide for this compiler")

    compiler(before)
    with checked_runtime(widths=(1, 2, 4), segments=segments) as rt:
        for i in range(4):
            serve(rt, f"t{i}", weight=i)
        rt.warm_up(60.0)
        failed = rt.health().failed
        assert failed["family 0 x4"] == "family 0 x4: RuntimeError: too wide for this compiler"
        assert len(failed) == segments and all("too wide for this compiler" in why for why in failed.values())
        assert widths_of(rt) == [1] * segments + [2] * segments
        for _ in range(3):
            replies = [rt.submit(f"t{i % 4}", vector(i)) for i in range(24)]
            for i, reply in enumerate(replies):
                np.testing.assert_array_equal(reply.result(60), vector(i % 4 + i))
        assert tried.count(4) == segments and rt.health().ok


@in_segments
def test_a_tenant_for_whom_nothing_can_be_compiled_is_refused_alone(compiler, segments: int):
    with checked_runtime(widths=(1,), segments=segments) as rt:
        serve(rt, "served")

        def before(entries: Any) -> None:
            raise RuntimeError("no")

        compiler(before)
        held = held_from_now()
        with pytest.raises(CompileError, match="family 1 .*x1: RuntimeError: no") as kept:
            serve(rt, "refused", times)
        assert kept.value and held() <= 2 * vector(0).nbytes, "its bank stays as long as the error"
        np.testing.assert_array_equal(rt.submit("served", vector(2)).result(60), vector(3))
        assert rt.health().tenants == 1 and not rt.health().failed  # nobody is left who would want it
        serve(rt, "same family")  # for which nothing is to be compiled
        assert set(rt.stats().tenants) == {"served", "same family"}


@in_segments
def test_a_bank_whose_executables_cannot_be_made_larger_stays_as_it_is(compiler, segments: int):
    with checked_runtime(widths=(1,), capacity=1, segments=segments) as rt:
        serve(rt, "served")

        def before(entries: Any) -> None:
            raise RuntimeError("no")

        compiler(before)
        with pytest.raises(CompileError):
            serve(rt, "one too many")
        np.testing.assert_array_equal(rt.submit("served", vector(2)).result(60), vector(3))
        assert set(rt.stats().tenants) == {"served"}


@in_segments
def test_a_compiler_that_stalls_keeps_no_newcomer_waiting_and_is_given_up(compiler, monkeypatch, segments: int):
    monkeypatch.setattr(foundry, "SLOW_S", 0.05)
    stalled, go = threading.Event(), threading.Event()

    def before(entries: Any) -> None:
        if entries == (Entry(0, 0, 2),):
            stalled.set()
            go.wait(60)

    compiler(before)
    with checked_runtime(widths=(1, 2), segments=segments) as rt:
        serve(rt, "a")
        serve(rt, "b")  # two of them want to run together
        assert stalled.wait(30)
        serve(rt, "newcomer", times, 3.0)
        np.testing.assert_array_equal(rt.submit("newcomer", vector(2)).result(60), vector(6))
        np.testing.assert_array_equal(rt.submit("a", vector(2)).result(60), vector(3))
        made = rt._stations[0].foundry
        while len(made._running) > 1 or made._jobs:  # whatever else is slow on this host is waited for
            time.sleep(0.01)
        made._stall_s = 0.0
        rt.warm_up(60.0)
        assert "not compiled after 0 s" in rt.health().failed["family 0 x2"]
        go.set()


@in_segments
def test_what_was_on_order_when_the_runtime_was_closed_has_not_failed(compiler, segments: int):
    stalled, go = threading.Event(), threading.Event()

    def before(entries: Any) -> None:
        if entries[0].width == 2:
            stalled.set()
            go.wait(60)

    compiler(before)
    with checked_runtime(widths=(1, 2, 4), segments=segments) as rt:
        serve(rt, "a")
        serve(rt, "b")
        serve(rt, "c")
        assert stalled.wait(30)
        closing = threading.Thread(target=rt.close)
        closing.start()
        while rt.health().compiling:  # until what was on order is given up
            time.sleep(0.01)
        go.set()
        closing.join()
        assert rt.health().status == "closed" and not rt.health().failed


@in_segments
def test_at_most_so_many_executables_are_kept_and_each_family_can_be_served(segments: int):
    with checked_runtime(widths=(1, 2, 4, 8), executables=3 * segments, segments=segments) as rt:
        for i in range(6):
            serve(rt, f"t{i}", weight=i)
        serve(rt, "other", times, 2.0)
        rt.warm_up(60.0)
        kept = [e.entries[0] for e in rt._stations[0].device.catalog.executables]
        narrow = [(entry.family, entry.segment) for entry in kept if entry.width == 1]
        assert len(kept) == 3 * segments and sorted(narrow) == [(f, s) for f in (0, 1) for s in range(segments)]
        replies = [rt.submit(f"t{i % 6}", vector(i)) for i in range(48)]
        for i, reply in enumerate(replies):
            np.testing.assert_array_equal(reply.result(60), vector(i % 6 + i))
        np.testing.assert_array_equal(rt.submit("other", vector(4)).result(60), vector(8))


def test_where_none_may_go_what_is_new_does_and_nobody_waits_for_it():
    with checked_runtime(widths=(1, 2), executables=1) as rt:
        for i in range(2):
            rt.add_tenant(f"t{i}", add, vector(i), example=(vector(1),), slo=SLO, verify=True)
        rt.warm_up(60.0)
        assert widths_of(rt) == [1] and "see Runtime(executables=)" in rt.health().failed["family 0 x2"]
        serve(rt, "other", times)
        rt.remove_tenant("other")
        assert not rt.health().failed, "there may be room for it now"
        np.testing.assert_array_equal(rt.submit("t1", vector(1)).result(60), vector(2))


@in_segments
def test_without_memory_for_many_lanes_fewer_run_together(monkeypatch, segments: int):
    """The device says so when the bundle runs, or when it is dispatched."""
    right = Bundle.wait

    def wait(self: Bundle) -> None:
        if sum(map(len, self._entries)) > 2:
            raise OutOfDeviceMemory("RESOURCE_EXHAUSTED: as if")
        right(self)

    with checked_runtime(widths=(1, 2, 8), segments=segments) as rt:
        for i in range(8):
            serve(rt, f"t{i}", weight=i)
        rt.warm_up(60.0)
        monkeypatch.setattr(Bundle, "wait", wait)
        for _ in range(2):
            replies = [rt.submit(f"t{i % 8}", vector(i)) for i in range(32)]
            for i, reply in enumerate(replies):
                np.testing.assert_array_equal(reply.result(60), vector(i % 8 + i))
        rt.drain(30.0)
        assert "family 0 x8" in rt.health().failed
        assert all(e.entries != (Entry(0, 0, 8),) for e in rt._stations[0].device.catalog.executables)


def test_policies_are_made_for_each_of_several_devices():
    with pytest.raises(InvalidInput, match="a list of at least one JAX device"):
        Runtime(devices=[])


def run(code: str, **env: str) -> str:
    """In a process of its own."""
    own = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    own |= {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu", **env}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stderr
    return done.stdout


TWO_DEVICES = """
import logging
import jax, numpy as np
import coalesce
records = []
log = logging.getLogger("coalesce.runtime")
log.setLevel(logging.INFO)
log.addFilter(lambda record: records.append(record) or True)
from tests.checked import checked_runtime
add, times = (lambda w, x: w + x), (lambda w, x: w * x)
one, three = np.full(4, 1, np.float32), np.full(4, 3, np.float32)
with checked_runtime(devices=jax.devices(), widths=(1, 2)) as rt:
    for i in range(4):
        rt.add_tenant(f"t{i}", times if i % 2 else add, three, example=(one,), slo=30.0)
    rt.warm_up(60.0)
    replies = [(i % 4, rt.submit(f"t{i % 4}", one * i)) for i in range(40)]
    for i, (tenant, reply) in enumerate(replies):
        np.testing.assert_array_equal(reply.result(60), 3 * one * i if tenant % 2 else 3 + one * i)
        assert rt.explain(reply).endswith("ok")
    banks = {f"t{i}": rt._tenancy.residents[f"t{i}"].host.store.bank for i in range(4)}
    at = {name: {str(device) for x in bank for device in x.devices()} for name, bank in banks.items()}
    assert at["t0"] == at["t2"] != at["t1"] == at["t3"], at
    assert rt.stats().lanes == 40 and set(rt.health().devices.values()) == {"serving"}
    rt._tenancy.residents["t0"].driver.lose(coalesce.DeviceError("as if it were gone"))
    assert rt.health().status == "degraded" and not rt.health().ok
    for name in ("t0", "t2"):
        try:
            rt.submit(name, one)
        except coalesce.DeviceError:
            continue
        raise AssertionError(name)
    np.testing.assert_array_equal(rt.submit("t1", one).result(60), 3 * one)
    rt.add_tenant("new", lambda w, x: w - x, three, example=(one,), slo=30.0)
    np.testing.assert_array_equal(rt.submit("new", one).result(60), 2 * one)
    served = rt._tenancy.residents["new"].driver, rt._tenancy.residents["t1"].driver
    rt.remove_tenant("t0")
    assert "t0" not in rt.stats().tenants
    for name in ("t0", "moved"):  # of the schema of t2, whose device is gone
        rt.add_tenant(name, add, three, example=(one,), slo=30.0)
        np.testing.assert_array_equal(rt.submit(name, one).result(60), 4 * one)
        assert rt._tenancy.residents[name].driver is served[1]
    rt.remove_tenant("t2")
    assert rt.health().tenants == 5
    assert served[0] is served[1] is rt._stations[1].driver and rt._process.apart._process is not None
assert not [said for said in map(logging.LogRecord.getMessage, records) if "where it is served" in said]
assert jax.config.jax_default_device is None and jax.config.jax_compilation_cache_dir is None
"""

FUSED = """
weights, row = np.full((4, 4), 0.5, np.float32), np.ones((1, 4), np.float32)
fused = coalesce.fuse([coalesce.trace(lambda w, x: x @ w, weights, row, name=name) for name in "ab"])
staged = fused.staged()
for device in jax.devices():
    with jax.default_device(device):
        given = [(jax.device_put(row, device),)] * 2
        for got in (*fused(given), *staged.unstage(staged(staged.stage(given)))):
            np.testing.assert_array_equal(got, 2 * row)
"""


FULL_DEVICES = """
import jax, numpy as np
import coalesce
from tests.checked import checked_runtime
first, second = jax.devices()
many = 10_000
x = np.ones(many, np.float32)
taken = lambda w, x: x * w + w
with checked_runtime(devices=[first, second], widths=(1, 2), memory_limit=6 * 4 * many) as rt:
    def add(name, i, **how):
        rt.add_tenant(name, taken, np.full(many, i, np.float32), example=(x,), slo=30.0, **how)
    def home(name):
        (at,) = {at for x in rt._tenancy.residents[name].host.store.bank for at in x.devices()}
        return at
    homes = []
    try:
        for i in range(100):
            add(f"t{i}", i)
            homes.append(home(f"t{i}"))
    except coalesce.OutOfDeviceMemory as e:
        assert "are free" in str(e), e
    count = homes.index(second)
    assert homes == [first] * count + [second] * count, homes
    for i in range(2 * count):
        np.testing.assert_array_equal(rt.submit(f"t{i}", x).result(60), 2 * i * x)
    try:
        add("pinned", 7, device=first)
        raise AssertionError("it fits")
    except coalesce.OutOfDeviceMemory:
        pass
    rt.remove_tenant(f"t{2 * count - 1}")
    add("pinned", 7, device=second)
    assert home("pinned") == second
    np.testing.assert_array_equal(rt.submit("pinned", x).result(60), 14 * x)
    rt.update_tenant("pinned", np.full(many, 9, np.float32))
    np.testing.assert_array_equal(rt.submit("pinned", x).result(60), 18 * x)
    try:
        add("elsewhere", 7, device="the moon")
        raise AssertionError("it is there")
    except coalesce.InvalidInput as e:
        assert "tenant 'elsewhere': the runtime has no device the moon; it has " in str(e), e
"""


@pytest.mark.once  # a process
def test_who_does_not_fit_a_device_lives_on_another():
    run(FULL_DEVICES, XLA_FLAGS="--xla_force_host_platform_device_count=2", COALESCE_COMPILED="")


def test_families_live_on_devices_and_one_that_fails_takes_only_its_own_along():
    """Also what is compiled in another process is for the device that it is to run on, the second one. A fused program
    stays where it was made, whichever device is the default by then and has its inputs."""
    two = "--xla_force_host_platform_device_count=2"
    run(TWO_DEVICES + FUSED, XLA_FLAGS=two, COALESCE_COMPILED="", COALESCE_APART="1")


CACHED = """
import sys, jax, numpy as np
from jax import monitoring
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
if len(sys.argv) > 1:
    jax.config.update("jax_compilation_cache_dir", sys.argv[1])
hits = []
monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
import coalesce
x = np.zeros(4, np.float32)
before = jax.config.jax_compilation_cache_dir
with coalesce.Runtime(widths=(1,)) as rt:
    rt.add_tenant("t", lambda w, x: w + x, x + 1, example=(x,), slo=30.0)
    assert jax.config.jax_compilation_cache_dir == before
    np.testing.assert_array_equal(rt.submit("t", x).result(60), x + 1)
print(len(hits))
"""


def test_what_was_compiled_is_found_by_the_next_process(tmp_path):
    assert int(run(CACHED, COALESCE_COMPILED=str(tmp_path / "compiled"))) == 0
    assert any((tmp_path / "compiled").iterdir())
    assert int(run(CACHED, COALESCE_COMPILED=str(tmp_path / "compiled"))) > 0


@pytest.mark.once  # a process, and no more than the folder's name differs
def test_a_folder_that_the_user_gave_jax_is_used_and_kept(tmp_path):
    code = CACHED.replace("len(sys.argv) > 1", "True").replace("sys.argv[1]", repr(str(tmp_path / "own")))
    run(code, COALESCE_COMPILED=str(tmp_path / "ours"))
    assert any((tmp_path / "own").iterdir()) and not (tmp_path / "ours").exists()


def test_a_device_that_is_dead_is_told_from_a_tenant_that_raises(monkeypatch):
    """Whether the device still works is asked of the device."""
    with checked_runtime(widths=(1,)) as rt:
        serve(rt, "a")
        serve(rt, "b", times)
        rt.warm_up(60.0)

        def dead(*_: Any) -> None:
            raise RuntimeError("INTERNAL: as if")

        monkeypatch.setattr(jax, "block_until_ready", dead)
        monkeypatch.setattr(Executable, "fetch", dead)  # which waits, where results are on the host anyway
        error = rt.submit("a", vector(1)).exception(60)
        assert isinstance(error, DeviceError) and "does not work any more" in str(error)
        assert rt.health().status == "failed"
        with pytest.raises(DeviceError):
            rt.submit("b", vector(1))
        with pytest.raises(DeviceError):
            serve(rt, "c")


def test_nobody_waits_for_a_tenant_whose_device_dies_while_it_is_added(compiler):
    compiling, going_on = threading.Event(), threading.Event()

    def hold(entries: Any) -> None:
        compiling.set()
        going_on.wait(60)

    compiler(hold)
    with checked_runtime(widths=(1,)) as rt:
        added = rt.add_tenant("a", add, vector(1), example=(vector(0),), slo=SLO, wait=False)
        assert compiling.wait(60)
        rt._stations[0].driver.lose(DeviceError("it is gone"))
        assert isinstance(added.exception(60), DeviceError)
        going_on.set()


@jax.tree_util.register_pytree_node_class
class Picky:
    """A tenant's own class, which will not be made again of NumPy arrays that are negative."""

    raises: type[BaseException] = ValueError

    def __init__(self, value: Any) -> None:
        self.value = value

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> "Picky":
        if isinstance(children[0], np.ndarray) and (children[0] < 0).any():
            raise cls.raises("I do not like it")
        return cls(*children)


@pytest.mark.parametrize("raises", [ValueError, SystemExit])  # which ends a thread that nobody guards
def test_results_that_a_tenants_own_class_refuses_are_its_own_failure(monkeypatch, raises):
    monkeypatch.setattr(Picky, "raises", raises)
    with checked_runtime(widths=(1, 2, 4)) as rt:
        serve(rt, "picky", lambda w, x: Picky(w + x))
        serve(rt, "other")
        rt.warm_up(60.0)
        replies = [rt.submit(name, vector(-5 * (i == 2))) for i in range(4) for name in ("picky", "other")]
        for i, reply in enumerate(replies):
            if i == 4:
                with pytest.raises(TenantFailure, match="'picky'.*I do not like it"):
                    reply.result(60)
            else:
                result = reply.result(60)
                np.testing.assert_array_equal(result.value if i % 2 == 0 else result, vector(1 - 5 * (i == 5)))
        assert rt.drain(60.0) and rt.stats().tenants["picky"].failed == 1 and rt.health().ok
