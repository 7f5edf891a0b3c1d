"""A request on its way through the runtime, and whom to tell how it ended.

Whoever waits has a `Reply`, a future of concurrent.futures, or is a coroutine of some event loop. What a bundle decided
for the coroutines of one loop is told in one call, since each call from another thread wakes the loop up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import InvalidStateError
from typing import Any, NamedTuple

from coalesce.runtime.reply import Reply
from coalesce.scheduler.request import Request
from coalesce.serving.pool import Pool


class State(NamedTuple):
    """Where a request that has begun, and whose program is cut, has its weights and its values between segments."""

    pool: Pool
    slot: int  # of the pool
    life: int  # the pool's, when the request began
    weights: int  # the slot of the bank: those that it began with, even if its tenant was given others since


class Ticket:
    """One request: what it asks for, and who waits for it."""

    __slots__ = (
        "request", "resident", "form", "inputs", "waiter", "loop", "state", "bundles", "failure", "told", "claimed",
    )  # fmt: skip

    def __init__(
        self, request: Request, resident: Any, form: Any, inputs: list[Any], waiter: Any, loop: Any = None
    ) -> None:
        self.request = request
        self.resident = resident  # its tenant, as it is on the device
        self.form = form  # which of its request shapes
        self.inputs = inputs  # flat, as NumPy arrays
        self.waiter: Reply | asyncio.Future[Any] = waiter
        self.loop: asyncio.AbstractEventLoop | None = loop  # of a coroutine
        self.state: State | None = None
        self.bundles: list[int] = []  # that it was a lane of
        self.failure: Exception | None = None  # of the last bundle with it that failed
        self.told = False  # the policy of it
        self.claimed = False  # by the one thread that ends it


class Ending(NamedTuple):
    """How a request ends: with a result, or with an error."""

    ticket: Ticket
    result: Any
    error: BaseException | None = None


def tell(endings: Iterable[Ending]) -> None:
    """Tell everybody who waits, of requests of one driver; whoever gave up waiting is told nothing."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Ending]] = {}
    called: list[Reply] = []
    for ending in endings:
        ticket, result, error = ending
        waiter = ticket.waiter
        if ticket.loop is not None:
            by_loop.setdefault(ticket.loop, []).append(ending)
        elif not isinstance(waiter, Reply) or not waiter.end_alone(result, error):
            settle(waiter, ending)
        elif waiter.callbacks:
            called.append(waiter)
    if called:  # one item for the thread that calls them, instead of one each
        called[0].server.call_all_back(called)
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(settle_all, own)
        except RuntimeError:  # the loop is closed, and with it whoever waited
            continue


def settle_all(endings: Iterable[Ending]) -> None:
    for ending in endings:
        settle(ending.ticket.waiter, ending)


def settle(waiter: Any, ending: Ending) -> None:
    """Whoever has cancelled is told nothing, but a `Reply` that its request is out of the way."""
    try:
        if ending.error is not None:
            waiter.set_exception(ending.error)
        else:
            waiter.set_result(ending.result)
    except (InvalidStateError, asyncio.InvalidStateError):
        if isinstance(waiter, Reply) and waiter.cancelled() and not ending.ticket.bundles:
            waiter.set_running_or_notify_cancel()  # for concurrent.futures.wait, to which it is done from here on
