"""Memory of a call and the CUDA graph that uses it: one seat for each call under way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from coalesce.capture.aside import Aside, Graph, Place, place_of
from coalesce.capture.cuda import NOT_READY, Owned
from coalesce.capture.ending import Around
from coalesce.errors import CaptureError
from coalesce.serving.executable import Frame
from coalesce.serving.mirrored import Mirrored
from coalesce.serving.page_locked import has_processors

LITTLE = 64 * 2**10  # bytes that are as soon there as another stream is told of them: a part of the graph


class NoSeat(CaptureError):
    """Another time there may be memory."""


class Made:
    """A program that JAX has compiled; whoever runs it beside others runs the same."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled


class Part(NamedTuple):
    """An entry: a program of its own, whatever runs beside it, as JAX calls it and loaded where it is captured."""

    frame: Frame
    made: Made
    program: Any
    aside: Aside

    @property
    def results(self) -> list[jax.ShapeDtypeStruct]:
        return self.frame.returned.structs


class Berth(NamedTuple):
    """Of a seat what one entry uses: where it is given what was staged, and where its results lie, on both sides."""

    part: Part
    sent: Place
    given: np.ndarray
    into: Sequence[Place]
    left: Sequence[np.ndarray]

    def captured(self, bank: Sequence[Place], around: Around) -> Owned:
        """The graph that reads a bank which lies there; raises CaptureError."""
        return self.part.aside.capture(self.part.program, ([list(bank)], self.sent), self.into, around)

    def results(self) -> list[np.ndarray]:
        """Copies, of the one entry."""
        (shown,) = self.part.frame.returned.shown([x.copy() for x in self.left])
        assert shown is not None, "an entry without results was captured"
        return shown


class Seat:
    """What one call at a time uses: what is brought to the device lies in one place, and so does what it leaves, so
    that one copy each way brings it. Raises NoSeat if there is no memory for it."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts, self._line = parts, parts[0].aside.line
        cuda = self._line.cuda
        try:
            with cuda:
                self._sent = Mirrored(cuda, [part.frame.staging.structs for part in parts])
                self._left = Mirrored(cuda, [own for part in parts for own in part.results])
                self._arrived, self._ended = cuda.event(), cuda.event(sleeps=not has_processors())
        except RuntimeError as e:
            raise NoSeat(f"there is no memory for what a call brings and leaves: {e}") from e
        into, left = iter(self._left.places), iter(self._left.arrays)
        self.berths = [
            Berth(part, sent, given, list(islice(into, len(part.results))), list(islice(left, len(part.results))))
            for part, sent, given in zip(parts, self._sent.places, self._sent.arrays, strict=True)
        ]
        # Branches of a graph begin at once, and end when they like: what is copied is so before and after all of them.
        self._is_one = len(parts) == 1
        self._is_little = self._is_one and self.berths[0].given.nbytes <= LITTLE
        self._graph: Graph | None = None
        self._reads: Any = None  # where the banks lay when it was captured

    @property
    def address(self) -> int:
        """Somewhere on the device."""
        return self.berths[0].sent.address

    def capture(self, banks: Sequence[Sequence[Place]]) -> None:
        """For banks that lie there; raises CaptureError."""
        brings, leaves = [self._sent.to_device] if self._is_little else [], [self._left.to_host] if self._is_one else []
        graphs = [own.captured(bank, Around(brings, leaves)) for own, bank in zip(self.berths, banks, strict=True)]
        self._graph = Graph(self._line, graphs, [part.program for part in self._parts])
        self._reads = [[place.address for place in own] for own in banks]

    def fits(self, banks: Sequence[Sequence[jax.Array]]) -> bool:
        return self._reads == [[x.unsafe_buffer_pointer() for x in own] for own in banks]

    def launch(self) -> None:
        """With what was staged; returns before it has begun. Whoever replaces a bank waits for the line first."""
        graph, line, cuda = self._graph, self._line, self._line.cuda
        assert graph is not None, "a seat without a graph"
        with cuda:
            if not self._is_little:  # while what was launched before runs
                cuda.copy(*self._sent.to_device, line.bringing)
                cuda("cuEventRecord", self._arrived.handle, line.bringing)
                cuda("cuStreamWaitEvent", line.stream, self._arrived.handle, 0)
            graph.launch_soon()
            if not self._is_one:
                cuda.copy(*self._left.to_host, line.stream)
            cuda("cuEventRecord", self._ended.handle, line.stream)

    def wait(self) -> None:
        """Until its results are here."""
        with self._line.cuda:
            self._line.cuda.wait("cuEventSynchronize", self._ended.handle)

    def settle(self) -> None:
        """Until nothing that it has begun is under way, however far a launch has come."""
        self._line.wait()

    def is_ready(self) -> bool:
        """Whether `wait` returns at once, or raises."""
        with self._line.cuda:
            return self._line.cuda.library.cuEventQuery(self._ended.handle) != NOT_READY


def fit(seat: Seat, banks: Sequence[Sequence[jax.Array]]) -> None:
    """Captured for banks as they lie now."""
    if not seat.fits(banks):
        seat.capture([[place_of(x) for x in own] for own in banks])
