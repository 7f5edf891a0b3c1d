"""Tenants that come and go under load: in any order, from many threads, a thousand of them (a fiftieth here); with
programs whole and in three segments.
"""

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import initialize, precondition, rule, RuleBasedStateMachine, run_state_machine_as_test
from jax import monitoring

from coalesce.errors import InvalidInput, TenantClosed
from coalesce.runtime.device import Device
from coalesce.runtime.foundry import MIXED
from coalesce.runtime.reply import Reply
from coalesce.runtime.runtime import Runtime
from tests.checked import checked_runtime
from tests.memory import held_from_now

SLO = 60.0
MEANWHILE = 5  # requests, while a compiler works for somebody else
PICK = st.integers(0, 999)  # nothing is drawn inside a rule, since the runtime's threads may use `random` meanwhile
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda w, x: (w + x) * 2 - w,
    "times": lambda w, x: (w * x + w) * 2,
}


def vector(value: float) -> np.ndarray:
    return np.full(4, value, np.float32)


def expected(kind: str, weight: float, x: float) -> np.ndarray:
    return FUNCTIONS[kind](vector(weight), vector(x))


def another(number: int) -> Callable[[Any, Any], Any]:
    """Of a family of its own."""
    return lambda w, x: (w + x) * 2 - (w + number)


@pytest.fixture(scope="module", params=[1, pytest.param(3, marks=pytest.mark.once)], ids=["whole", "in segments"])
def watched(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """A runtime with a tenant of each kind that stays, so that little is compiled anew; all decisions are checked."""
    segments = request.param
    with checked_runtime(widths=(1, 4), capacity=4 if segments == 1 else 32, segments=segments, compiled=False) as rt:
        for kind, fn in FUNCTIONS.items():
            rt.add_tenant(f"stays {kind}", fn, vector(1), example=(vector(0),), slo=SLO, quota=100_000)
        rt.warm_up(120.0)
        assert set((rt._stations[0].device.catalog.segments or {}).values()) <= {segments}
        yield rt


class Churn(RuleBasedStateMachine):
    """Whatever was asked for ends once, with its own tenant's result or with a reason."""

    rt: Runtime

    @initialize()
    def begin(self) -> None:
        self.present: dict[str, tuple[str, float]] = {}
        self.gone: set[str] = set()
        self.sent: list[tuple[Reply, str, np.ndarray]] = []
        self.numbers = itertools.count()

    def one(self, pick: int) -> str:
        """Of those that are there."""
        return sorted(self.present)[pick % len(self.present)]

    @rule(kind=st.sampled_from(sorted(FUNCTIONS)), weight=st.integers(-3, 3))
    def add(self, kind: str, weight: int) -> None:
        name = f"t{next(self.numbers) % 5}"
        if name in self.present:
            with pytest.raises(InvalidInput, match="already"):
                self.rt.add_tenant(name, FUNCTIONS[kind], vector(weight), example=(vector(0),), slo=SLO)
            return
        self.rt.add_tenant(name, FUNCTIONS[kind], vector(weight), example=(vector(0),), slo=SLO)
        self.present[name] = (kind, weight)

    @precondition(lambda self: self.present)
    @rule(pick=PICK, weight=st.integers(-3, 3))
    def update(self, pick: int, weight: int) -> None:
        name = self.one(pick)
        self.rt.drain(60.0)  # else a request may read the old weights or the new ones
        self.present[name] = (self.present[name][0], weight)
        self.rt.update_tenant(name, vector(weight))

    @precondition(lambda self: self.present)
    @rule(pick=PICK, drain=st.booleans())
    def remove(self, pick: int, drain: bool) -> None:
        name = self.one(pick)
        del self.present[name]
        self.rt.remove_tenant(name, drain=drain, timeout=60.0)
        with pytest.raises(TenantClosed):
            self.rt.submit(name, vector(0))

    @precondition(lambda self: self.present)
    @rule(pick=PICK, x=st.integers(-5, 5), count=st.integers(1, 6))
    def submit(self, pick: int, x: int, count: int) -> None:
        name = self.one(pick)
        kind, weight = self.present[name]
        for i in range(count):
            self.sent.append((self.rt.submit(name, vector(x + i)), name, expected(kind, weight, x + i)))

    @precondition(lambda self: self.sent)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        self.sent[pick % len(self.sent)][0].cancel()

    @rule()
    def drain(self) -> None:
        assert self.rt.drain(60.0)
        assert all(reply.done() for reply, _, _ in self.sent)

    def teardown(self) -> None:
        for name in list(getattr(self, "present", ())):
            self.rt.remove_tenant(name, timeout=60.0)
        for reply, _, want in getattr(self, "sent", ()):
            try:
                np.testing.assert_array_equal(reply.result(60), want)
            except (CancelledError, TenantClosed):
                continue
        stats = self.rt.stats().tenants
        assert all(own.pending == 0 for own in stats.values()) and len(stats) == len(FUNCTIONS)


@pytest.mark.parametrize("examples", [6, pytest.param(300, marks=pytest.mark.soak)])
def test_any_order_of_coming_going_asking_and_giving_up(watched: Runtime, examples: int):
    machine = type("ChurnOfOne", (Churn,), {"rt": watched})
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=20))


def test_sixteen_threads_add_remove_and_submit(watched: Runtime):
    wrong: list[Any] = []

    def client(k: int) -> None:
        chosen, kind = random.Random(k), sorted(FUNCTIONS)[k % 2]
        try:
            for round_ in range(3):
                weight = float(k + round_)
                watched.add_tenant(f"t{k}", FUNCTIONS[kind], vector(weight), example=(vector(0),), slo=SLO)
                replies = [(i, watched.submit(f"t{k}", vector(i))) for i in range(8)]
                given_up = {i for i, reply in replies if chosen.random() < 0.2 and reply.cancel()}
                drain = chosen.random() < 0.5
                watched.remove_tenant(f"t{k}", drain=drain, timeout=120.0)
                for i, reply in replies:
                    if i in given_up:
                        continue
                    error = reply.exception(120)
                    if not (error is None or (isinstance(error, TenantClosed) and not drain)):
                        wrong.append((k, i, error))
                    elif error is None and not np.array_equal(reply.result(0), expected(kind, weight, i)):
                        wrong.append((k, i, reply.result(0)))
        except BaseException as e:
            wrong.append((k, e))

    threads = [threading.Thread(target=client, args=(k,)) for k in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(watched.stats().tenants) == {f"stays {kind}" for kind in FUNCTIONS}


@pytest.mark.parametrize("count", [8, pytest.param(156, marks=pytest.mark.soak)])
def test_64_threads_submit_and_everybody_gets_their_own(watched: Runtime, count: int):
    replies: list[list[Reply]] = [[] for _ in range(64)]
    kinds = sorted(FUNCTIONS)

    def client(k: int) -> None:
        asked = (vector(100 * k + i) for i in range(count))
        replies[k] += (watched.submit(f"stays {kinds[k % 2]}", x, deadline=600.0) for x in asked)

    before = {name: own.ok for name, own in watched.stats().tenants.items()}
    threads = [threading.Thread(target=client, args=(k,)) for k in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, own in enumerate(replies):
        for i, reply in enumerate(own):
            np.testing.assert_array_equal(reply.result(600), expected(kinds[k % 2], 1, 100 * k + i))
    assert watched.drain(60.0)
    assert {name: own.ok - before[name] for name, own in watched.stats().tenants.items()} == dict.fromkeys(
        before, 32 * count
    )


class Steady(threading.Thread):
    """Asks for a tenant every ten milliseconds, as long as others come and go."""

    def __init__(self, rt: Runtime, name: str) -> None:
        super().__init__(daemon=True)
        self.rt, self.name_of, self.over = rt, name, threading.Event()
        self.sent: list[Reply] = []

    def run(self) -> None:
        while not self.over.wait(0.01):
            self.sent.append(self.rt.submit(self.name_of, vector(2)))

    def wait_served(self) -> None:
        """Until some that it asks for from now on are there."""
        first = len(self.sent)
        while len(self.sent) < first + MEANWHILE and self.is_alive():
            time.sleep(0.001)
        for reply in self.sent[first:]:
            reply.result(SLO)


@pytest.fixture
def stalling(monkeypatch: pytest.MonkeyPatch) -> list[Steady]:
    """The compiler of a new family is not done before those in the list were served meanwhile."""
    right, others = Device.compile, list[Steady]()

    def compile(self: Device, entries: Any, capacities: Any) -> Any:
        if entries[0][1:] == (0, 1):
            for other in others:
                other.wait_served()
        return right(self, entries, capacities)

    monkeypatch.setattr(Device, "compile", compile)
    return others


@pytest.fixture
def compiled_on() -> Iterator[set[str]]:
    """The threads on which XLA was called."""
    names: set[str] = set()

    def heard(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            names.add(threading.current_thread().name)

    monitoring.register_event_duration_secs_listener(heard)
    yield names
    monitoring.unregister_event_duration_listener(heard)


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.soak)])
def test_tenants_come_and_go_under_load_and_leave_nothing(watched: Runtime, stalling, compiled_on, count: int):
    """Every twentieth is the first of its family. Whoever stays is served while they wait for their compiler; no thread
    that serves compiles; and the device holds in the end what it held before."""
    watched.add_tenant("steady", FUNCTIONS["add"], vector(1), example=(vector(0),), slo=SLO)
    steady, held, before = Steady(watched, "steady"), held_from_now(), None
    executables = watched.health().executables
    steady.start()
    stalling.append(steady)
    try:
        newcomers: list[Future[None]] = []
        for i in range(count):
            if i % 20 == 4:
                name, fn = f"new{i}", another(i)
                newcomers.append(watched.add_tenant(name, fn, vector(i), example=(vector(0),), slo=SLO, wait=False))
            kind = sorted(FUNCTIONS)[i % 2]
            watched.add_tenant(f"t{i}", FUNCTIONS[kind], vector(i), example=(vector(0),), slo=SLO)
            np.testing.assert_array_equal(watched.submit(f"t{i}", vector(1)).result(60), expected(kind, i, 1))
            watched.remove_tenant(f"t{i}", drain=bool(i % 3), timeout=60.0)
            if i == 3:
                before = held()
            if i % 20 == 19:
                newcomers[-1].result(60)
                number = i - 15
                result = watched.submit(f"new{number}", vector(1)).result(60)
                np.testing.assert_array_equal(result, another(number)(vector(number), vector(1)))
                watched.remove_tenant(f"new{number}", timeout=60.0)
    finally:
        steady.over.set()
        steady.join()
    watched.drain(60.0)
    assert not compiled_on & {thread.name for thread in watched._stations[0].driver.threads}
    assert all(np.array_equal(reply.result(0), expected("add", 1, 2)) for reply in steady.sent)
    assert before is not None and abs(held() - before) < 10_000
    left = {e.family for own in watched._stations[0].device.catalog.executables for e in own.entries}
    assert left == {family for own in watched._tenancy.residents.values() for family in own.host.families}
    assert watched.health().executables <= executables + 2 + MIXED
    watched.remove_tenant("steady", timeout=60.0)


def test_one_that_goes_in_the_middle_of_a_bundle_takes_its_own_results_along(watched: Runtime):
    watched.add_tenant("goes", FUNCTIONS["add"], vector(5), example=(vector(0),), slo=SLO)
    for drain in (True, False):
        replies = [watched.submit(name, vector(i)) for i in range(40) for name in ("goes", "stays add")]
        watched.remove_tenant("goes", drain=drain, timeout=60.0)
        for i, reply in enumerate(replies[1::2]):
            np.testing.assert_array_equal(reply.result(60), expected("add", 1, i))
        errors = [reply.exception(60) for reply in replies[::2]]
        assert all(e is None for e in errors) if drain else all(isinstance(e, TenantClosed | None) for e in errors)
        if drain:
            watched.add_tenant("goes", FUNCTIONS["add"], vector(5), example=(vector(0),), slo=SLO)
