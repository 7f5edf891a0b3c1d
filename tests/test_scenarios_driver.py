"""Requests that are given up, deadlines that pass, ends in the middle of everything: the driver under many hands.

On a machine without JAX, with programs whole and in three segments, at a fiftieth of the size of `make soak`, with
everything checked that is always true of its decisions (tests/fake_machine.py).
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, wait
from typing import Any

import pytest

from coalesce.errors import DeadlineExceeded, Shutdown, TenantClosed
from coalesce.runtime.observer import Observer
from coalesce.runtime.reply import Reply
from coalesce.runtime.ticket import Ending
from coalesce.scheduler.commands import Command, Reject
from coalesce.scheduler.events import Closed, Event, Submitted
from tests.fake_machine import FakeMachine, Served

pytestmark = pytest.mark.once

SMALL, FULL = 1_000, 100_000
SIZES = [SMALL, pytest.param(FULL, marks=pytest.mark.soak)]
EACH = [31, pytest.param(10_000, marks=pytest.mark.soak)]  # of 64 threads
in_segments = pytest.mark.parametrize("segments", [1, 3])


@in_segments
def test_cancelled_before_during_after_and_twice(segments: int):
    machine = FakeMachine(segments=segments)
    machine.go.clear()
    with Served(machine) as served:
        during, behind = served.submit("t0", "during"), [served.submit("t0", i) for i in range(8)]
        while len(machine.launches) < 2:  # no more are dispatched before one is done
            time.sleep(0.001)
        before = served.submit("t1", "before")
        assert before.cancel() and before.cancel() and before.cancelled()
        assert not during.cancel()
        machine.go.set()
        assert during.result(10) == ("result", "during") and all(reply.result(10) for reply in behind)
        assert not during.cancel() and not during.cancelled()
        assert served.driver.book.wait_empty(10.0)
        served.driver.withdraw(before.request)  # of one that is long gone
        served.driver.withdraw(10**9)
        assert served.submit("t1", "next").result(10) == ("result", "next")
        assert "before" not in [value for own in machine.launches for value in own]


@in_segments
@pytest.mark.parametrize("count", SIZES)
def test_random_cancels(count: int, segments: int):
    """Each ends exactly once, and whoever did not cancel has a result. They have an hour: while somebody hands in
    100,000 without a pause the driver hardly runs, and what waits looks as if a minute would not do."""
    machine = FakeMachine(takes_s=0.0001, segments=segments)
    chosen, ended = random.Random(0), list[Any]()
    with Served(machine, quota=count) as served:
        replies = []
        for i in range(count):
            reply = served.submit(f"t{i % 4}", i, deadline_s=3600.0)
            reply.add_done_callback(ended.append)
            replies.append(reply)
            chosen.choice(replies[-50:]).cancel()  # some twice, so that others never are
        assert wait(replies, 120).not_done == set()
        assert served.driver.book.wait_empty(10.0) and served.driver.callbacks.wait_called(10.0)
        assert len(ended) == len(set(map(id, ended))) == count
        assert not all(r.cancelled() for r in replies)
        assert all(r.cancelled() or r.result(0) == ("result", i) for i, r in enumerate(replies))
        tenants = served.accounts.stats().tenants.values()
        assert sum(t.submitted for t in tenants) == count and not any(t.pending for t in tenants)
        assert 0 < sum(t.cancelled for t in tenants) <= sum(r.cancelled() for r in replies)  # some were on their way


@in_segments
def test_a_storm_of_disconnects_leaves_an_empty_queue(segments: int):
    """Eight in ten of those who wait in an event loop go away; the next request is served as if nothing had been."""
    machine = FakeMachine(segments=segments)
    machine.go.clear()

    async def client(served: Served, i: int) -> object:
        loop = asyncio.get_running_loop()
        reply = served.submit(f"t{i % 4}", i)
        ticket = served.driver.book.tickets[reply.request]
        ticket.waiter, ticket.loop = loop.create_future(), loop
        try:
            return await ticket.waiter
        except asyncio.CancelledError:
            served.driver.withdraw(reply.request)
            raise

    async def main(served: Served) -> int:
        tasks = [asyncio.create_task(client(served, i)) for i in range(500)]
        await asyncio.sleep(0)
        for task in tasks[::5]:
            task.set_name("stays")
        for task in tasks:
            if task.get_name() != "stays":
                task.cancel()
        machine.go.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        stayed = [result for task, result in zip(tasks, results, strict=True) if task.get_name() == "stays"]
        assert stayed == [("result", i) for i in range(0, 500, 5)]
        return sum(isinstance(result, asyncio.CancelledError) for result in results)

    with Served(machine) as served:
        assert asyncio.run(main(served)) == 400
        assert served.driver.book.wait_empty(10.0)
        launched = len(machine.launches)
        assert served.submit("t0", "next").result(10) == ("result", "next")
        assert len(machine.launches) == launched + segments  # nothing was in front of it


@in_segments
def test_an_expired_request_is_never_dispatched(segments: int):
    machine = FakeMachine(takes_s=0.002, segments=segments)
    with Served(machine) as served:
        replies = [
            served.submit(f"t{i % 4}", i, deadline_s=60.0 if i % 10 == 0 else 0.001 * (1 + i % 40)) for i in range(400)
        ]
        wait(replies, 30)
        for i, reply in enumerate(replies):
            error = reply.exception(0)
            assert error is None or (isinstance(error, DeadlineExceeded) and i % 10)
            assert error is not None or reply.result(0) == ("result", i)
        ran = {value for own in machine.launches for value in own}
        right = {i for i, reply in enumerate(replies) if reply.exception(0) is None}
        assert ran == right if segments == 1 else ran >= right  # one may expire between two segments


class AtOnce(Observer):
    """Who was refused as soon as the policy heard of it."""

    def __init__(self) -> None:
        self.refused: list[int] = []

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        if isinstance(event, Submitted):
            came = {request.id for request in event.requests}
            self.refused += [c.request for c in commands if isinstance(c, Reject) and c.request in came]


@in_segments
def test_who_is_refused_learns_it_at_once(segments: int):
    """Not when its deadline comes, nor when anything else happens: with a queue that is full of what was admitted."""
    machine, at_once = FakeMachine(takes_s=5.0, segments=segments), AtOnce()
    machine.go.clear()
    # 50 s, in which ten bundles end, or five of those that take twice as long
    with Served(machine, slo_s=50.0, observers=[at_once]) as served:
        full = [served.submit(f"t{i % 4}", i) for i in range(100)]
        refused = [served.submit(f"t{i % 4}", i) for i in range(100)]
        assert all(isinstance(reply.exception(30), DeadlineExceeded) for reply in refused)
        assert set(at_once.refused) == {reply.request for reply in [*full, *refused] if reply.done()}
        taken_on = sum(not reply.done() for reply in full)
        assert 8 < taken_on < 100
        # nothing is kept of the others
        assert served.driver.book.wait_for(lambda tickets: len(tickets) == taken_on, 30.0)
        served.driver.inbox.put(Closed(drain=False))
        machine.takes_s = 0.0


class Sink(Observer):
    """Raises at the third thing that it is told."""

    def __init__(self) -> None:
        self.told = 0

    def decided(self, *_: object) -> None:
        self.told += 1
        if self.told == 3:
            raise OSError("the disk is full")


@in_segments
def test_a_sink_that_breaks_in_the_middle_costs_nobody_a_result(caplog, segments: int):
    sink = Sink()
    with caplog.at_level(logging.CRITICAL), Served(FakeMachine(segments=segments), observers=[sink]) as served:
        replies = [served.submit(f"t{i % 4}", i) for i in range(100)]
        replies[7].add_done_callback(lambda _: 1 / 0)
        assert [reply.result(10) for reply in replies] == [("result", i) for i in range(100)]
    assert sink.told == 3


@in_segments
@pytest.mark.parametrize("drain", [True, False])
def test_an_end_with_a_full_queue(drain, segments: int):
    machine = FakeMachine(segments=segments)
    machine.go.clear()
    with Served(machine, quota=300) as served:
        replies = [served.submit(f"t{i % 4}", i) for i in range(1000)]
        served.driver.inbox.put(Closed(drain))
        late = served.submit("t0", "late")
        machine.go.set()
        wait([*replies, late], 30)
        assert isinstance(late.exception(0), Shutdown)
        errors = [reply.exception(0) for reply in replies]
        assert all(e is None or isinstance(e, Shutdown) for e in errors)
        assert sum(e is None for e in errors) == 1000 if drain else sum(e is None for e in errors) <= 16
    assert not any(thread.is_alive() for thread in served.driver.threads)


def sent_by_64_threads(served: Served, count: int) -> tuple[list[threading.Thread], list[list[Reply]]]:
    """The threads, and what each of them has submitted so far."""
    replies: list[list[Reply]] = [[] for _ in range(64)]

    def client(k: int) -> None:
        replies[k] += (served.submit(f"t{k}", (k, i)) for i in range(count))

    threads = [threading.Thread(target=client, args=(k,)) for k in range(64)]
    for thread in threads:
        thread.start()
    return threads, replies


@in_segments
@pytest.mark.parametrize("count", EACH)
def test_64_threads_submit_and_everybody_is_served(count: int, segments: int):
    """Exactly once each, with its own result, and what was submitted is what ended."""
    ended: list[Ending] = []

    class Ends(Observer):
        def ended(self, endings: Sequence[Ending], now_ns: int) -> None:
            ended.extend(endings)

    machine = FakeMachine(takes_s=0.0001, segments=segments)
    with Served(machine, tenants=64, quota=100_000, slo_s=600.0, observers=[Ends()]) as served:
        threads, replies = sent_by_64_threads(served, count)
        for thread in threads:
            thread.join()
        for k, own in enumerate(replies):
            assert [reply.result(300) for reply in own] == [("result", (k, i)) for i in range(count)]
        assert served.driver.book.wait_empty(10.0)
        tenants = served.accounts.stats().tenants.values()
    assert len(ended) == len({ending.ticket.request.id for ending in ended}) == 64 * count
    assert all(t.submitted == t.ok == count for t in tenants)


@in_segments
@pytest.mark.parametrize("count", [8, pytest.param(10_000, marks=pytest.mark.soak)])
def test_64_threads_submit_while_another_one_ends_it_all(count: int, segments: int):
    """Exactly once each, whatever the end; and what was submitted is what ended."""
    machine = FakeMachine(takes_s=0.0001, segments=segments)
    with Served(machine, tenants=64, quota=100_000, slo_s=60.0) as served:
        threads, replies = sent_by_64_threads(served, count)
        served.driver.inbox.put(Closed(drain=True))
        for thread in threads:
            thread.join()
        assert wait([reply for own in replies for reply in own], 120).not_done == set()
    for k, own in enumerate(replies):
        for i, reply in enumerate(own):
            error = reply.exception(0)
            assert isinstance(error, Shutdown) or reply.result(0) == ("result", (k, i))
    tenants = served.accounts.stats().tenants.values()
    assert sum(t.submitted for t in tenants) == 64 * count and not any(t.pending for t in tenants)


class Numbers(Observer):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def decided(self, event: object, now_ns: int, commands: object) -> None:
        if isinstance(event, Submitted):
            self.seen += (request.id for request in event.requests)


@in_segments
def test_a_removed_tenant_may_be_asked_by_threads_that_do_not_know_yet(segments: int):
    machine, numbers = FakeMachine(takes_s=0.0001, segments=segments), Numbers()
    with Served(machine, tenants=8, observers=[numbers]) as served:
        outcomes: list[BaseException | None] = []

        def client(k: int) -> None:
            for i in range(50):
                if i == 25 and k % 2:
                    served.driver.inbox.put(served.leaving(f"t{k}", drain=bool(k % 4 == 1)))
                reply = served.submit(f"t{k}", (k, i))
                try:
                    assert reply.result(20) == ("result", (k, i))
                    outcomes.append(None)
                except (TenantClosed, CancelledError) as e:
                    outcomes.append(e)

        threads = [threading.Thread(target=client, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 400 and sum(isinstance(e, TenantClosed) for e in outcomes) == 4 * 25
        assert numbers.seen == sorted(numbers.seen) and len(numbers.seen) == 400
