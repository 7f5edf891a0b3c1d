"""An executable whose calls are launches of a CUDA graph, without JAX (coalesce/capture).

A call of JAX's executable takes its host some 0.2 ms for 16 ResNet-50, with what it brings and what it asks for; to
launch a graph, which leaves its results on the host too, takes a tenth of that. A graph has addresses in it: so each
call has a seat, with memory for its arguments and results on both sides and a graph that uses it, until its results
were read. A bank is written in place, and graphs are captured anew only when it has grown.

Where all seats are taken, or there is no memory for one, the program is called as JAX calls it. One that is cut has
registers that it hands on, one that runs as it is may look at values, and where a program always has the same kernels
there is no other way than JAX's: these have no seats.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import jax
import numpy as np

from coalesce import jaxpr as J
from coalesce.capture.aside import Aside, Graph, Place, place_of
from coalesce.capture.cuda import NOT_READY
from coalesce.capture.ending import Around, ends, Recording
from coalesce.errors import CaptureError
from coalesce.lower import run_stacked
from coalesce.serving.executable import bundle_of, compile_executable, Executable, Frame, frame_of, Lanes, picked
from coalesce.serving.fit import Template
from coalesce.serving.making import Jitted, Make, make_here
from coalesce.serving.page_locked import has_processors
from coalesce.serving.pool import Pool
from coalesce.serving.returned import Returned
from coalesce.serving.staging import Filled, Lane, Staging
from coalesce.serving.words import is_narrow, nbytes, WORD

SEATS = 3  # one runs, one waits for it, and one is staged
LITTLE = 64 * 2**10  # bytes that are as soon there as another stream is told of them: a part of the graph
INTO = 2  # the argument that results are left in

LOG = logging.getLogger("coalesce.runtime")

lost: list[Any] = []  # memory of calls of which nobody knows whether they have ended


class NoSeat(CaptureError):
    """Another time there may be memory."""


class Seat:
    """What one call at a time uses. Raises NoSeat if there is no memory for it."""

    def __init__(self, aside: Aside, staging: Staging, returned: Returned) -> None:
        self._line = aside.line
        cuda, self._results = self._line.cuda, returned.structs
        try:
            with cuda:
                self.given = given = cuda.host_memory(staging.structs.size, WORD)  # what is staged
                self._sent = cuda.memory(given.nbytes)
                self._into = [cuda.memory(nbytes(part)) for part in self._results]
                self._left = [cuda.host_memory(part.size, np.dtype(part.dtype)) for part in self._results]
                self._arrived, self._ended = cuda.event(), cuda.event(sleeps=not has_processors())
        except RuntimeError as e:
            raise NoSeat(f"there is no memory for what a call brings and leaves: {e}") from e
        self._is_little = given.nbytes <= LITTLE
        self._brings = self._sent.address, given.ctypes.data, given.nbytes
        self._leaves = [
            (left.ctypes.data, into.address, nbytes(part))
            for left, into, part in zip(self._left, self._into, self._results, strict=True)
        ]
        self._argument = Place(self._sent.address, staging.structs)
        self._graph: Graph | None = None
        self._reads: Any = None  # where the banks lay when it was captured

    def capture(self, aside: Aside, program: Any, banks: Sequence[Sequence[Place]]) -> None:
        """For banks that lie there; raises CaptureError."""
        into = [Place(memory.address, part) for memory, part in zip(self._into, self._results, strict=True)]
        given = [list(own) for own in banks], self._argument
        around = Around([self._brings] if self._is_little else [], self._leaves)
        self._graph = Graph(self._line, [aside.capture(program, given, into, around)], program)
        self._reads = [[place.address for place in own] for own in banks]

    @property
    def address(self) -> int:
        """Somewhere on the device."""
        return self._sent.address

    def fits(self, banks: Sequence[Sequence[jax.Array]]) -> bool:
        return self._reads == [[x.unsafe_buffer_pointer() for x in own] for own in banks]

    def launch(self) -> None:
        """With what was staged; returns before it has begun. Whoever replaces a bank waits for the line first."""
        graph, line, cuda = self._graph, self._line, self._line.cuda
        assert graph is not None, "a seat without a graph"
        with cuda:
            if not self._is_little:  # while what was launched before runs
                cuda.copy(*self._brings, line.bringing)
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

    def results(self) -> list[np.ndarray]:
        """Copies, as `Returned.structs` says."""
        return [left.reshape(part.shape).copy() for left, part in zip(self._left, self._results, strict=True)]


class CapturedExecutable(Executable):
    """`compiled` is the program as JAX calls it, `program` the same for the client on which it is captured."""

    def __init__(
        self, lanes: Sequence[Lanes], frame: Frame, compiled: Any, aside: Aside, program: Any, seats: Sequence[Seat]
    ) -> None:
        super().__init__(tuple(lanes), *frame, compiled)
        self.aside, self.program = aside, program
        self.free = deque(filled_of(seat, frame.staging) for seat in seats)  # any thread takes one, or gives one back

    def stage(self, entries: Sequence[Sequence[Lane]]) -> Filled:
        try:
            filled = self.free.popleft()
        except IndexError:
            return super().stage(entries)
        try:
            self.staging.write(filled, entries)
        except Exception:
            self.free.append(filled)
            raise
        return filled

    def run(self, banks: Sequence[Sequence[jax.Array]], pools: Sequence[Pool | None], filled: Filled) -> Any:
        """A seat, or what another executable gives."""
        seat, now = filled.seat, [list(own) for own in banks]  # which nobody frees until it is launched
        if seat is None:
            return self._called(now, filled)
        try:
            self._fit(seat, now)
        except CaptureError as e:
            LOG.warning("called as JAX does, from now on where it would have had this seat: %s", e)
            filled.seat = None
            return self._called(now, filled)
        seat.launch()
        return seat

    def _fit(self, seat: Seat, banks: Sequence[Sequence[jax.Array]]) -> None:
        if not seat.fits(banks):
            seat.capture(self.aside, self.program, [[place_of(x) for x in own] for own in banks])

    def _called(self, banks: list[list[jax.Array]], filled: Filled) -> list[list[jax.Array]]:
        into = [np.zeros(part.shape, part.dtype) for part in self.returned.structs]
        with Recording.alone:
            *results, _ = self.compiled(banks, filled.arguments, into)
        return self.returned.as_packed(results)

    def make_ready(self, banks: Sequence[Sequence[jax.Array]]) -> None:
        """So that no seat has to be captured when it is needed."""
        for filled in list(self.free):
            self._fit(filled.seat, banks)

    def send_back(self, outputs: Any) -> None:
        if not isinstance(outputs, Seat):
            super().send_back(outputs)

    def leaves_here(self, outputs: Any) -> bool:
        return isinstance(outputs, Seat)

    def is_ready(self, outputs: Any) -> bool:
        return outputs.is_ready() if isinstance(outputs, Seat) else super().is_ready(outputs)

    def fetch(self, outputs: Any) -> list[Any]:
        if not isinstance(outputs, Seat):
            return super().fetch(outputs)
        outputs.wait()
        return self.returned.shown(outputs.results())

    def take_back(self, filled: Filled) -> None:
        if filled.seat is None:
            super().take_back(filled)
        else:
            self.free.append(filled)

    def take_back_failed(self, filled: Filled) -> None:
        if filled.seat is None:
            super().take_back_failed(filled)
            return
        try:
            filled.seat.settle()
        except Exception as e:
            LOG.info("memory of a call that failed is left alone: %s: %s", type(e).__name__, e)
            lost.append(filled)
            return
        self.free.append(filled)


def filled_of(seat: Seat, staging: Staging) -> Filled:
    """Its memory, of zeros. It holds the seat, which does not hold it: what only the collector finds would stay."""
    filled = staging.over(seat.given)
    filled.clear()
    filled.seat = seat
    return filled


class Capturing:
    """Makes executables, captured where they can be, if there is a client for it; called on any thread."""

    def __init__(self, aside: Aside | None) -> None:
        self.aside = aside
        self._never: WeakSet[Template] = WeakSet()  # what was tried and does what no CUDA graph can

    def made(self, lanes: Sequence[Lanes], make: Make = make_here) -> Executable:
        if self.aside is not None and may_capture(lanes) and not any(own.program in self._never for own in lanes):
            try:
                return capture_executable(lanes, make, self.aside)
            except CaptureError as e:
                LOG.info("called as JAX does: %s", e)
                if len(lanes) == 1 and not isinstance(e, NoSeat) and "RESOURCE_EXHAUSTED" not in str(e):
                    self._never.add(lanes[0].program)
        return compile_executable(lanes, make=make)


def may_capture(lanes: Sequence[Lanes]) -> bool:
    """Whether it is worth trying."""
    whole = all(len(own.segments) == 1 and not own.schema.options.as_it_is for own in lanes)
    plain = all(own.program.takes_zeros for own in lanes)  # no loop that looks at a value, and nothing calls back
    parts = [part for own in lanes for part in own.program.outputs]
    return whole and plain and bool(parts) and not any(is_narrow(part.dtype) for part in parts)


def capture_executable(lanes: Sequence[Lanes], make: Make, aside: Aside) -> CapturedExecutable:
    """Raises CaptureError, if the program does what no CUDA graph can."""
    frame = frame_of(lanes, packed=True, captured=True)
    if not frame.staging.packed:
        raise CaptureError("what it is given cannot lie in one buffer")
    with J.precision_as_traced():
        made = make(partial(captured_recipe, tuple(own._replace(schema=own.schema.bank) for own in lanes)))
    program = aside.load(made)
    seats = [Seat(aside, frame.staging, frame.returned) for _ in range(SEATS)]
    # Nothing is read now, so the banks may lie anywhere. The first time loads the program's code.
    nowhere = [[Place(seats[0].address, struct) for struct in own.schema.structs(own.capacity)] for own in lanes]
    seats[0].capture(aside, program, nowhere)
    return CapturedExecutable(lanes, frame, made, aside, program, seats)


def captured_recipe(lanes: Sequence[Lanes]) -> Jitted:
    bundle = bundle_of(lanes)
    staging, _, returned = frame_of(lanes, packed=True, captured=True)

    def serve(banks: Sequence[Sequence[Any]], arguments: Any, into: Any) -> list[Any]:
        given = staging.unpack(arguments)
        arrays = picked(bundle, lanes, banks, [own.slots for own in given])
        outputs = returned.pack(run_stacked(bundle, arrays, [own.inputs for own in given]))
        return [x for own in outputs for x in own]

    structs = [own.schema.structs(own.capacity) for own in lanes], staging.structs, returned.structs
    jitted = jax.jit(ends(serve), donate_argnums=INTO, keep_unused=True)
    return Jitted(jitted, structs, (INTO,), often=True, captured=True)
