"""Whoever asks what was counted, in a signal handler, say, waits for nobody, whatever his own thread is doing."""

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any

import pytest

from coalesce.runtime import account
from coalesce.runtime.accounts import Accounts
from coalesce.runtime.history import History
from coalesce.runtime.observer import Finished, Observer
from coalesce.runtime.ticket import Ending, Ticket
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.commands import Dispatch, Quarantine, Reason
from coalesce.scheduler.events import Submitted
from coalesce.scheduler.request import Request
from tests.annotations import nothing_checked

pytestmark = pytest.mark.once


def interrupted_everywhere(do: Callable[[], Any], of: object, handler: Callable[[], None]) -> None:
    """As by a signal at each line of the module that `of` is from. On a thread of its own, which may hang."""
    path, calls, raised = sys.modules[type(of).__module__].__file__, count(), list[BaseException]()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != path:
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
    accounts, told, names = Accounts(), Told(), count()
    for name in ("t0", "t1"):
        accounts.open(name)

    def ask() -> None:
        stats = accounts.stats()
        assert stats.lanes >= stats.bundles
        assert stats.device_s >= sum(own.device_s + own.padding_s for own in stats.tenants.values()) - 1e-12
        for own in stats.tenants.values():
            assert own.pending >= 0 and (own.latency_p50_s is not None or not own.ok + own.late)

    for tell in told.each(accounts):
        interrupted_everywhere(tell, accounts, ask)

    def count_on() -> None:
        accounts.open(f"new{next(names)}")
        elsewhere(told.each(accounts))
        ask()

    interrupted_everywhere(ask, accounts, count_on)
    own = accounts.stats().tenants["t0"]
    assert own.ok == own.rejected[Reason.EXPIRED] > 1 and own.submitted == 2 * own.ok and not own.pending


def test_requests_may_be_explained_anywhere_in_what_remembers_them():
    history, told, said = History(), Told(), list[str]()

    def ask() -> None:
        assert history.explain(99) is None and len(history.requests()) <= 4
        text = history.explain(0)
        if text is not None:
            said.append(text)

    for tell in told.each(history)[1:]:
        interrupted_everywhere(tell, history, ask)
    assert set(said) == {said[-1]} and "bundle 0" in said[-1]
    interrupted_everywhere(lambda: history.explain(0), history, lambda: elsewhere(told.each(history)))


def test_quantiles_are_of_the_last_thousand_and_sorted_for_by_who_looks(monkeypatch):
    """What was asked before does not change; and to ask about a thousand tenants sorts nothing."""
    accounts, sorted_for = Accounts(), list[float]()
    for name in ("t0", "t1"):
        accounts.open(name)
    right = account.quantile_s
    monkeypatch.setattr(account, "quantile_s", lambda ns, q: sorted_for.append(q) or right(ns, q))
    took_ns, asked = list[int](), list[tuple[Any, list[int]]]()
    for i in range(4500):
        took_ns.append(i * 7919 % 10_007)
        ticket = Ticket(Request(i, "t0", 0, 0, 5_000), None, None, [], Future())
        accounts.ended([Ending(ticket, None)], took_ns[-1])
        if i % 500 == 0 or 1990 < i < 2010:
            with nothing_checked():  # by looking at one of them
                asked.append((accounts.stats(), sorted(took_ns[-1000:])))
    assert not sorted_for
    for i, (stats, recent) in enumerate(asked):
        own = stats.tenants["t0"]
        assert own is stats.tenants["t0"] and len(sorted_for) == 2 * (i + 1)
        assert own.latency_p50_s == recent[int(0.5 * (len(recent) - 1) + 0.5)] / 1e9
        assert own.latency_p99_s == recent[int(0.99 * (len(recent) - 1) + 0.5)] / 1e9
    last = asked[-1][0].tenants
    assert set(last) == {"t0", "t1"} and last["t1"].latency_p50_s is None and "nobody" not in last
    assert repr(last) == repr(dict(last)) and last["t0"].late > 1000 < last["t0"].ok
