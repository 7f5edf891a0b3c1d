"""Tenants that come and go under load: in any order, from many threads, a thousand of them (a fiftieth here)."""

import itertools
import random
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import initialize, precondition, rule, RuleBasedStateMachine, run_state_machine_as_test

from coalesce.errors import InvalidInput, TenantClosed
from coalesce.runtime.reply import Reply
from coalesce.runtime.runtime import Runtime
from tests.checked import Checked
from tests.memory import held_from_now

SLO = 60.0
PICK = st.integers(0, 999)  # nothing is drawn inside a rule, since the runtime's threads may use `random` meanwhile
FUNCTIONS = {"add": lambda w, x: w + x, "times": lambda w, x: w * x}


def vector(value: float) -> np.ndarray:
    return np.full(4, value, np.float32)


def expected(kind: str, weight: float, x: float) -> np.ndarray:
    return vector(weight + x) if kind == "add" else vector(weight * x)


@pytest.fixture
def watched() -> Iterator[Runtime]:
    """A runtime with a tenant of each kind that stays, so that nothing is compiled anew; all decisions are checked."""
    checked = Checked()
    with Runtime(widths=(1, 4), capacity=4, observers=[checked], compiled=False) as rt:
        for kind, fn in FUNCTIONS.items():
            rt.add_tenant(f"stays {kind}", fn, vector(1), example=(vector(0),), slo=SLO)
        rt.warm_up(120.0)
        yield rt
    assert checked.violations() == []


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


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.soak)])
def test_tenants_come_and_go_under_load_and_leave_nothing(watched: Runtime, count: int):
    """Nobody who stays misses a deadline, and the device holds what it held before."""
    held, stop, answered = held_from_now(), threading.Event(), list[bool]()

    def client() -> None:
        while not stop.is_set():
            result = watched.submit("stays add", vector(2)).result(60)
            answered.append(bool(np.array_equal(result, vector(3))))

    thread = threading.Thread(target=client)
    thread.start()
    try:
        before, executables = None, watched.health().executables
        for i in range(count):
            kind = sorted(FUNCTIONS)[i % 2]
            watched.add_tenant(f"t{i}", FUNCTIONS[kind], vector(i), example=(vector(0),), slo=SLO)
            np.testing.assert_array_equal(watched.submit(f"t{i}", vector(1)).result(60), expected(kind, i, 1))
            watched.remove_tenant(f"t{i}", drain=bool(i % 3), timeout=60.0)
            if i == 3:
                before = held()
    finally:
        stop.set()
        thread.join()
    watched.drain(60.0)
    assert all(answered) and len(answered) > count
    stayed = watched.stats().tenants["stays add"]
    assert stayed.ok == len(answered) and not stayed.late and not stayed.rejected
    assert before is not None and abs(held() - before) < 10_000
    assert watched.health().executables <= executables + 2


def test_one_that_goes_in_the_middle_of_a_bundle_takes_its_own_results_along(watched: Runtime):
    watched.add_tenant("goes", FUNCTIONS["add"], vector(5), example=(vector(0),), slo=SLO)
    for drain in (True, False):
        replies = [watched.submit(name, vector(i)) for i in range(40) for name in ("goes", "stays add")]
        watched.remove_tenant("goes", drain=drain, timeout=60.0)
        for i, reply in enumerate(replies[1::2]):
            np.testing.assert_array_equal(reply.result(60), vector(1 + i))
        errors = [reply.exception(60) for reply in replies[::2]]
        assert all(e is None for e in errors) if drain else all(isinstance(e, TenantClosed | None) for e in errors)
        if drain:
            watched.add_tenant("goes", FUNCTIONS["add"], vector(5), example=(vector(0),), slo=SLO)
