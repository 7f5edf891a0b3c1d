"""A peer's way to serve: requests wait in one queue by deadline, and run one by one on an engine.

Whoever could not be in time any more, even if it ran next, is dropped when its turn comes, which favours the rest. Up
to `depth` requests are on the device at once, so that it does not wait for the host: one thread copies the next
request's input in and starts it, while another waits for those before and hands out their results.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from coalesce.errors import DeadlineExceeded


@runtime_checkable
class Engine(Protocol):
    """Runs what it is given in that order. A place has buffers of its own; who is at one has not ended."""

    def begin(self, tenant: str, inputs: Sequence[np.ndarray], place: int) -> Any:
        """Returns before the device is done."""
        ...

    def finish(self, begun: Any) -> Any:
        """Waits; returns the result, in memory of its own. Called on another thread, in the order of `begin`."""
        ...


class Waiting(NamedTuple):
    deadline_ns: int
    number: int
    tenant: str
    inputs: tuple[np.ndarray, ...]
    reply: Future[Any]


class UnderWay(NamedTuple):
    begun: Any  # or what `begin` raised
    begun_ns: int
    place: int
    reply: Future[Any]


class EdfQueue:
    """`slo_ns` by tenant; `run_ns` is what one run takes, of who is alone."""

    def __init__(
        self,
        engine: Engine,
        slo_ns: Mapping[str, int],
        depth: int = 1,
        run_ns: Mapping[str, int] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._engine, self._slo_ns, self._run_ns, self._clock = engine, slo_ns, run_ns or {}, clock
        self._heap: list[Waiting] = []
        self._numbers = count()
        self._places = deque(range(depth))
        self._under_way: deque[UnderWay] = deque()
        self._change = threading.Condition()
        self._open = 0  # requests that have not ended
        self._closed = False
        self.runs = self.dropped = self.busy_ns = 0
        self._threads = [
            threading.Thread(target=loop, name=f"edf-{loop.__name__.strip('_')}", daemon=True)
            for loop in (self._begin_all, self._finish_all)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, tenant: str, *inputs: np.ndarray, deadline: float | None = None) -> Future[Any]:
        """`deadline` in seconds from now; the tenant's SLO unless given."""
        reply: Future[Any] = Future()
        allowed_ns = self._slo_ns[tenant] if deadline is None else round(deadline * 1e9)
        with self._change:
            assert not self._closed, "the queue is closed"
            heapq.heappush(
                self._heap, Waiting(self._clock() + allowed_ns, next(self._numbers), tenant, inputs, reply)
            )
            self._open += 1
            self._change.notify_all()
        return reply

    def drain(self, timeout_s: float | None = None) -> bool:
        with self._change:
            return self._change.wait_for(lambda: not self._open, timeout_s)

    def close(self) -> None:
        """After what waits."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> EdfQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # One thread

    def _begin_all(self) -> None:
        while (taken := self._take()) is not None:
            request, place = taken
            begun_ns = self._clock()
            if begun_ns + self._run_ns.get(request.tenant, 0) > request.deadline_ns:
                self._drop(request, place)
                continue
            try:
                begun = self._engine.begin(request.tenant, request.inputs, place)
            except Exception as e:
                begun = e
            with self._change:
                self._under_way.append(UnderWay(begun, begun_ns, place, request.reply))
                self._change.notify_all()

    def _take(self) -> tuple[Waiting, int] | None:
        """Who is next, and where it runs; None at the end."""
        with self._change:
            self._change.wait_for(lambda: (self._heap and self._places) or (self._closed and not self._heap))
            return (heapq.heappop(self._heap), self._places.popleft()) if self._heap else None

    def _drop(self, request: Waiting, place: int) -> None:
        self.dropped += 1
        request.reply.set_exception(DeadlineExceeded(f"tenant {request.tenant!r}: it could not be in time any more"))
        self._leave(place)

    # The other

    def _finish_all(self) -> None:
        free_ns = 0  # when the device was done with the one before
        while (flight := self._oldest()) is not None:
            error = flight.begun if isinstance(flight.begun, Exception) else None
            result = None
            try:
                result = self._engine.finish(flight.begun) if error is None else None
            except Exception as e:
                error = e
            end_ns = self._clock()
            self.runs += 1
            self.busy_ns += end_ns - max(free_ns, flight.begun_ns)
            free_ns = end_ns
            with self._change:  # the next one begins before anybody is told
                self._places.append(flight.place)
                self._change.notify_all()
            flight.reply.set_exception(error) if error is not None else flight.reply.set_result(result)
            self._leave(None)

    def _oldest(self) -> UnderWay | None:
        with self._change:
            self._change.wait_for(lambda: self._under_way or (self._closed and not self._open))
            return self._under_way.popleft() if self._under_way else None

    def _leave(self, place: int | None) -> None:
        with self._change:
            if place is not None:
                self._places.append(place)
            self._open -= 1
            self._change.notify_all()
