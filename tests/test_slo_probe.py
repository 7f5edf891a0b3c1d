"""What slo_attainment does around a device: the peer's queue, probes, searches, and policies that take turns."""

import threading
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from coalesce.errors import DeadlineExceeded
from coalesce.scheduler.baselines.edf import Edf
from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command, Dispatch, Want
from coalesce.scheduler.events import CatalogChanged, Completed, Event, Submitted, TenantAdded, Timer
from coalesce.scheduler.request import Request, Tenant
from experiments.results import Row
from experiments.slo_probe import admitted_in_time, Bracket, Counts, probe, search
from experiments.slo_queue import EdfQueue
from experiments.switching import Switching, SwitchingElsewhere

pytestmark = pytest.mark.once

X = np.zeros(1, np.float32)


class Held:
    """An engine that finishes nothing before it is allowed to."""

    def __init__(self) -> None:
        self.began: list[tuple[str, int]] = []
        self.most = self._open = 0
        self.allowed = threading.Semaphore(0)

    def begin(self, tenant: str, inputs: Any, place: int) -> str:
        if tenant == "broken":
            raise ValueError("it does not begin")
        self.began.append((tenant, place))
        self._open += 1
        self.most = max(self.most, self._open)
        return tenant

    def finish(self, begun: str) -> str:
        assert self.allowed.acquire(timeout=60)
        self._open -= 1
        if begun == "ill":
            raise ValueError("it does not finish")
        return begun


@settings(max_examples=25)
@given(st.lists(st.integers(2, 99), min_size=1, max_size=12), st.integers(1, 4))
def test_a_queue_runs_by_deadline(slos_s, depth):
    """But for those that were on the device before the rest came."""
    engine = Held()
    names = [f"t{i}" for i in range(len(slos_s))]
    slo_ns = {name: slo * 10**9 for name, slo in zip(names, slos_s, strict=True)} | {"first": 10**9}
    with EdfQueue(engine, slo_ns, depth, clock=lambda: 0) as queue:
        first = [queue.submit("first", X) for _ in range(depth)]
        while len(engine.began) < depth:
            continue
        replies = {name: queue.submit(name, X) for name in names}
        for _ in range(depth + len(names)):
            engine.allowed.release()
        assert [reply.result(60) for reply in first] == ["first"] * depth
        assert {name: reply.result(60) for name, reply in replies.items()} == {name: name for name in names}
        assert queue.drain(60) and queue.runs == depth + len(names)
    assert [name for name, _ in engine.began[depth:]] == sorted(names, key=lambda name: (slo_ns[name], int(name[1:])))
    assert engine.most <= depth and {place for _, place in engine.began} <= set(range(depth))


def test_what_could_not_be_in_time_does_not_run():
    engine, now_ns = Held(), [0]
    with EdfQueue(engine, {"a": 100, "b": 100}, 1, {"a": 40, "b": 40}, clock=lambda: now_ns[0]) as queue:
        first = queue.submit("a", X)
        while not engine.began:
            continue
        late, in_time = queue.submit("b", X), queue.submit("a", X, deadline=1e-6)
        now_ns[0] = 61
        for _ in range(2):
            engine.allowed.release()
        assert first.result(60) == in_time.result(60) == "a"
        with pytest.raises(DeadlineExceeded, match="tenant 'b'"):
            late.result(60)
        assert (queue.runs, queue.dropped, len(engine.began)) == (2, 1, 2) and queue.drain(60)


def test_an_engine_that_fails_fails_one_request():
    engine = Held()
    for _ in range(3):
        engine.allowed.release()
    with EdfQueue(engine, dict.fromkeys(("broken", "ill", "well"), 10**12), 2) as queue:
        replies = {name: queue.submit(name, X) for name in ("broken", "ill", "well")}
        assert replies["well"].result(60) == "well"
        for name, why in (("broken", "begin"), ("ill", "finish")):
            with pytest.raises(ValueError, match=why):
                replies[name].result(60)


class Alternate:
    """Whoever asks is answered at once; every `n`-th one is refused."""

    def __init__(self, n: int) -> None:
        self.slo_ns = {"a": 10**12, "b": 10**12}
        self.sent, self._n = 0, n

    def begin(self) -> None:
        self.sent = 0

    def submit(self, tenant: str) -> Any:
        self.sent += 1
        reply: Future[int] = Future()
        if self.sent % self._n == 0:
            reply.set_exception(DeadlineExceeded("too late"))
        else:
            reply.set_result(0)
        return reply

    def drain(self) -> None:
        return

    def counts(self) -> Counts:
        return Counts(self.sent, 2 * self.sent, 0.0, self.sent // self._n, 0)


def test_a_probe_counts_what_clients_saw():
    row = probe(Alternate(4), 20_000.0, 1.0, 0.05, 1)
    assert row["requests"] == row["planned"] > 800
    assert row["attainment"] == pytest.approx(0.75, abs=1e-2) and row["refused"] == row["requests"] // 4
    assert row["lanes_a_bundle"] == 2 and row["late"] == 0 and 0 < row["pace"] <= 1
    assert admitted_in_time(row) == 1 and admitted_in_time({**row, "dropped": 10}) < 1


def test_a_probe_that_cannot_be_good_ends_early():
    row = probe(Alternate(4), 20_000.0, 1.0, 0.05, 1, patient=False)
    assert row["planned"] > 800 and row["attainment"] < 0.99
    assert row["requests"] == 4 * (int(0.01 * row["planned"]) + 1)
    good = probe(Alternate(10**6), 20_000.0, 1.0, 0.05, 1, patient=False)
    assert good["requests"] == good["planned"] and good["attainment"] == 1


@given(st.floats(0.02, 3), st.integers(0, 12))
def test_a_search_finds_the_rate_wherever_it_is_stopped(limit, stop):
    tried: list[float] = []

    def good(rate: float) -> Row | None:
        if len(tried) == stop:
            tried.append(0.0)
            raise TimeoutError
        tried.append(rate)
        return {"rate": rate} if rate <= limit else None

    found = Bracket()
    try:
        search(good, 1.0, 0.05, found)
    except TimeoutError:
        search(good, 1.0, 0.05, found)
    assert found.best == {"rate": found.low} and found.low <= limit < 1.05 * found.low
    assert len(tried) < 25 and (found.high or 0) > limit


def test_a_search_gives_up():
    found = Bracket()
    search(lambda rate: None, 1.0, 0.05, found)
    assert found.best is None and found.low == 0


@pytest.mark.parametrize("kind", [Switching, SwitchingElsewhere])
def test_policies_take_turns_in_one_runtime(kind):
    catalog = Catalog(tuple(Executable(i, (Entry(0, 0, 2**i),), 100, 100) for i in range(2)))
    policy = kind(Edf)

    def sent(*numbers: int) -> Submitted:
        return Submitted(tuple(Request(n, "a", 0, 0, 10**9) for n in numbers))

    policy.on_event(CatalogChanged(catalog), 0)
    policy.on_event(TenantAdded(Tenant("a", (0,), 10**9)), 0)
    first = [c for c in policy.on_event(sent(0), 1) if isinstance(c, Dispatch)]
    policy.change(Coalescing)
    policy.on_event(Completed(0, 1, 101), 102)
    second = [c for c in policy.on_event(sent(1, 2), 200) if isinstance(c, Dispatch)]
    assert [(c.bundle, c.lanes) for c in first + second] == [(0, ((0,),)), (1, ((1, 2),))]
    policy.change(Edf)
    policy.on_event(Completed(1, 200, 300), 300)
    third = [c for c in policy.on_event(sent(3, 4), 400) if isinstance(c, Dispatch)]
    assert [c.bundle for c in third] == [2, 3] and all(len(c.lanes[0]) == 1 for c in third)
    if kind is SwitchingElsewhere:
        policy.close()


@pytest.mark.parametrize("mixed", [False, True])
def test_what_a_policy_wants_of_several_families_is_heard_or_not(mixed):
    one, both = Want((Entry(0, 0, 4),)), Want((Entry(0, 0, 1), Entry(1, 0, 1)))

    class Wishful:
        def on_event(self, event: Event, now_ns: int) -> list[Command]:
            return [both, one]

    assert Switching(Wishful, mixed).on_event(Timer(), 0) == ([both, one] if mixed else [one])
