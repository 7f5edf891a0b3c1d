"""Whoever asks what was counted, in a signal handler, say, waits for nobody, whatever his own thread is doing."""

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from types import ModuleType
from typing import Any

import pytest

from coalesce.observing import counted, metrics
from coalesce.observing.metrics import Metrics
from coalesce.runtime import account, accounts, history
from coalesce.runtime.accounts import Accounts
from coalesce.runtime.history import History
from coalesce.runtime.observer import Finished, Observer
from coalesce.runtime.ticket import Ending, Ticket
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.commands import Dispatch, Quarantine, Reason
from coalesce.scheduler.events import Submitted, TenantAdded, TenantRemoved
from coalesce.scheduler.request import Request, Tenant
from tests.annotations import nothing_checked

pytestmark = pytest.mark.once


def interrupted_everywhere(do: Callable[[], Any], of: Sequence[ModuleType], handler: Callable[[], None]) -> None:
    """As by a signal at each line of these modules. On a thread of its own, which may hang."""
    paths, calls, raised = {module.__file__ for module in of}, count(), list[BaseException]()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in paths:
            return None
        if event == "line":
            next(calls)
            handler()
        return trace

    def run() -> None:
        sys.settrace(trace)
        try:
            do()
        except BaseException as e:
            raised.append(e)
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it waits for itself"
    assert not raised, raised
    assert next(calls), "nothing was interrupted"


def elsewhere(calls: Sequence[Callable[[], None]]) -> None:
    """On a thread that serves, for which a handler may wait: one that closes the runtime does."""
    thread = threading.Thread(target=lambda: [call() for call in calls], daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "it waits for who asks"


class Told:
    """Four requests of two tenants, which two bundles had, and what observers are told of them."""

    def __init__(self) -> None:
        requests = [Request(i, f"t{i % 2}", 0, 0, 100) for i in range(4)]
        self.tickets = [Ticket(request, None, None, [], Future()) for request in requests]
        self.commands = [Dispatch(0, 0, ((0, 1),), 10, 20, "full"), Quarantine("t1")]
        for ticket in self.tickets[:2]:
            ticket.bundles.append(0)
        entries = [self.tickets[:2]]
        self.bundle = Finished(self.commands[0], (Entry(0, 0, 4),), entries, 10, 30, None)

    def each(self, observer: Observer) -> Sequence[Callable[[], None]]:
        ended = [Ending(ticket, None) for ticket in self.tickets[:2]]
        stopped = dict.fromkeys(self.tickets[2:], Reason.EXPIRED)
        return [
            lambda: observer.decided(Submitted(tuple(t.request for t in self.tickets)), 0, self.commands),
            lambda: observer.finished(self.bundle),
            lambda: observer.ended(ended, 40),
            lambda: observer.rejected_together(stopped, 110),
        ]


def test_stats_may_be_asked_for_anywhere_in_what_counts_and_in_themselves():
    own, told, names = Accounts(), Told(), count()
    for name in ("t0", "t1"):
        own.open(name)

    def ask() -> None:
        stats = own.stats()
        assert stats.lanes >= stats.bundles
        assert stats.device_s >= sum(t.device_s + t.padding_s for t in stats.tenants.values()) - 1e-12
        for t in stats.tenants.values():
            assert t.pending >= 0 and (t.latency_p50_s is not None or not t.ok + t.late)

    for tell in told.each(own):
        interrupted_everywhere(tell, [account, accounts], ask)

    def count_on() -> None:
        own.open(f"new{next(names)}")
        elsewhere(told.each(own))
        ask()

    interrupted_everywhere(ask, [account, accounts], count_on)
    t0 = own.stats().tenants["t0"]
    assert t0.ok == t0.rejected[Reason.EXPIRED] > 1 and t0.submitted == 2 * t0.ok and not t0.pending


def test_requests_may_be_explained_anywhere_in_what_remembers_them():
    own, told, said = History(), Told(), list[str]()

    def ask() -> None:
        assert own.explain(99) is None and len(own.requests()) <= 4
        text = own.explain(0)
        if text is not None:
            said.append(text)

    for tell in told.each(own)[1:]:
        interrupted_everywhere(tell, [history], ask)
    assert set(said) == {said[-1]} and "bundle 0" in said[-1]
    interrupted_everywhere(lambda: own.explain(0), [history], lambda: elsewhere(told.each(own)))


def test_metrics_may_be_asked_for_anywhere_in_what_counts_and_in_themselves():
    own, told, names = Metrics(), Told(), count()
    for name in ("t0", "t1"):
        own.decided(TenantAdded(Tenant(name, (0,), 100)), 0, ())

    def ask() -> None:
        found = defaultdict[str, float](float)
        for sample in (sample for metric in own.collect() for sample in metric.samples):
            found[sample.name] += sample.value
            assert sample.value >= 0, sample
        assert found["coalesce_requests_submitted_total"] >= found["coalesce_requests_total"]

    for tell in told.each(own):
        interrupted_everywhere(tell, [counted, metrics], ask)

    def count_on() -> None:
        own.decided(TenantRemoved("new", False) if next(names) % 2 else TenantAdded(Tenant("new", (0,), 100)), 0, ())
        elsewhere(told.each(own))

    interrupted_everywhere(ask, [counted, metrics], count_on)


def test_a_scrape_that_is_not_read_to_its_end_holds_nobody_up():
    own, told = Metrics(), Told()
    scrape = own.collect()
    assert next(iter(scrape)).name == "coalesce_requests_submitted"
    elsewhere(told.each(own))


def test_quantiles_are_of_the_last_thousand_and_sorted_for_by_who_looks(monkeypatch):
    """What was asked before does not change; and to ask about a thousand tenants sorts nothing."""
    counts, sorted_for = Accounts(), list[float]()
    for name in ("t0", "t1"):
        counts.open(name)
    right = account.quantile_s
    monkeypatch.setattr(account, "quantile_s", lambda ns, q: sorted_for.append(q) or right(ns, q))
    took_ns, asked = list[int](), list[tuple[Any, list[int]]]()
    for i in range(4500):
        took_ns.append(i * 7919 % 10_007)
        ticket = Ticket(Request(i, "t0", 0, 0, 5_000), None, None, [], Future())
        counts.ended([Ending(ticket, None)], took_ns[-1])
        if i % 500 == 0 or 1990 < i < 2010:
            with nothing_checked():  # by looking at one of them
                asked.append((counts.stats(), sorted(took_ns[-1000:])))
    assert not sorted_for
    for i, (stats, recent) in enumerate(asked):
        own = stats.tenants["t0"]
        assert own is stats.tenants["t0"] and len(sorted_for) == 2 * (i + 1)
        assert own.latency_p50_s == recent[int(0.5 * (len(recent) - 1) + 0.5)] / 1e9
        assert own.latency_p99_s == recent[int(0.99 * (len(recent) - 1) + 0.5)] / 1e9
    last = asked[-1][0].tenants
    assert set(last) == {"t0", "t1"} and last["t1"].latency_p50_s is None and "nobody" not in last
    assert repr(last) == repr(dict(last)) and last["t0"].late > 1000 < last["t0"].ok
