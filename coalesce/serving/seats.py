"""Memory of a call and the CUDA graph that uses it: one seat for each call under way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from coalesce.capture.aside import Aside, Graph, Place, place_of
from coalesce.capture.cuda import NOT_READY, Owned
from coalesce.capture.ending import Around
from coalesce.errors import CaptureError
from coalesce.serving.executable import Frame
from coalesce.serving.page_locked import has_processors
from coalesce.serving.words import nbytes, WORD

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


class Berth:
    """What one call at a time uses of an entry. In the driver's context."""

    def __init__(self, part: Part) -> None:
        self._part, cuda = part, part.aside.line.cuda
        self.given = cuda.host_memory(part.frame.staging.structs.size, WORD)  # what is staged
        self._sent = cuda.memory(self.given.nbytes)
        self._into = [cuda.memory(nbytes(own)) for own in part.results]
        self._left = [cuda.host_memory(own.size, np.dtype(own.dtype)) for own in part.results]
        self.brings = self._sent.address, self.given.ctypes.data, self.given.nbytes
        self._leaves = [
            (left.ctypes.data, into.address, nbytes(own))
            for left, into, own in zip(self._left, self._into, part.results, strict=True)
        ]

    def captured(self, bank: Sequence[Place], brings: bool) -> Owned:
        """The graph that reads a bank which lies there, and brings what was staged, or finds it brought; raises
        CaptureError."""
        part, into = self._part, [Place(m.address, own) for m, own in zip(self._into, self._part.results, strict=True)]
        given = [list(bank)], Place(self._sent.address, part.frame.staging.structs)
        return part.aside.capture(part.program, given, into, Around([self.brings] if brings else [], self._leaves))

    @property
    def address(self) -> int:
        """Somewhere on the device."""
        return self._sent.address

    def results(self) -> list[np.ndarray]:
        """Copies, of the one entry."""
        copies = [x.reshape(own.shape).copy() for x, own in zip(self._left, self._part.results, strict=True)]
        (shown,) = self._part.frame.returned.shown(copies)
        assert shown is not None, "an entry without results was captured"
        return shown


class Seat:
    """What one call at a time uses. Raises NoSeat if there is no memory for it."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts, self._line = parts, parts[0].aside.line
        cuda = self._line.cuda
        try:
            with cuda:
                self.berths = [Berth(part) for part in parts]
                self._arrived, self._ended = cuda.event(), cuda.event(sleeps=not has_processors())
        except RuntimeError as e:
            raise NoSeat(f"there is no memory for what a call brings and leaves: {e}") from e
        # Branches of a graph begin at once: what is brought there has to be there before.
        self._is_little = len(parts) == 1 and self.berths[0].given.nbytes <= LITTLE
        self._graph: Graph | None = None
        self._reads: Any = None  # where the banks lay when it was captured

    def capture(self, banks: Sequence[Sequence[Place]]) -> None:
        """For banks that lie there; raises CaptureError."""
        graphs = [berth.captured(bank, self._is_little) for berth, bank in zip(self.berths, banks, strict=True)]
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
                for berth in self.berths:
                    cuda.copy(*berth.brings, line.bringing)
                cuda("cuEventRecord", self._arrived.handle, line.bringing)
                cuda("cuStreamWaitEvent", line.stream, self._arrived.handle, 0)
            graph.launch_soon()
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
