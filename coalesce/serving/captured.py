"""An executable whose calls are launches of a CUDA graph, without JAX (coalesce/capture).

A call of JAX's executable takes its host some 0.2 ms for 16 ResNet-50, with what it brings and what it asks for; to
launch a graph, which leaves its results on the host too, takes a tenth of that. A graph has addresses in it: so each
call has a seat (coalesce/serving/seats.py), with memory for its arguments and results on both sides and a graph that
uses it, until its results were read. A bank is written in place, and graphs are captured anew only when it has grown.

Families that share an executable are branches of one graph, and run at once: each is the program that it is alone,
since launches that cost nothing need not be shared.

Where all seats are taken, or there is no memory for one, programs are called as JAX calls them. One that is cut has
registers that it hands on, one that runs as it is may look at values, and where a program always has the same kernels
there is no other way than JAX's: these have no seats.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet, WeakValueDictionary

import jax
import numpy as np

from coalesce import jaxpr as J
from coalesce.capture.aside import Aside, Place
from coalesce.capture.ending import ends, Recording
from coalesce.errors import CaptureError
from coalesce.lower import run_stacked
from coalesce.serving.executable import bundle_of, compile_executable, Executable, frame_of, Lanes, picked
from coalesce.serving.fit import Template
from coalesce.serving.making import Jitted, Make, make_here
from coalesce.serving.pool import Pool
from coalesce.serving.seats import fit, Made, NoSeat, Part, Seat
from coalesce.serving.staging import Filled, Lane
from coalesce.serving.words import is_narrow, WORD

SEATS = 4  # one runs, two wait for it, and of one the results are read
INTO = 2  # the argument that results are left in
# Whether XLA may be asked to launch programs on threads of its own, after a call has returned.
WAYS = ("PJRT_GPU_ENABLE_ASYNC_DISPATCH", "XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT")
LATER = any(os.environ.get(way) for way in WAYS)

LOG = logging.getLogger("coalesce.runtime")

lost: list[Any] = []  # memory of calls of which nobody knows whether they have ended


class Called(NamedTuple):
    """What each entry's program has returned, as JAX has called it."""

    outputs: list[list[list[jax.Array]]]


class CapturedExecutable(Executable):
    """Entries are branches of one graph, each the program that it is when it runs alone."""

    def __init__(self, lanes: Sequence[Lanes], parts: Sequence[Part], seats: Sequence[Seat]) -> None:
        frame = frame_of(lanes, packed=True, captured=True)
        super().__init__(tuple(lanes), *frame, [part.made.compiled for part in parts])
        self._parts = parts
        self.free = deque(filled_of(seat, parts) for seat in seats)  # any thread takes one, or gives one back

    def stage(self, entries: Sequence[Sequence[Lane]]) -> Filled:
        try:
            filled = self.free.popleft()
        except IndexError:
            filled = filled_of(None, self._parts)
        try:
            self.staging.write(filled, entries)
        except Exception:
            self.take_back(filled)
            raise
        return filled

    def run(self, banks: Sequence[Sequence[jax.Array]], pools: Sequence[Pool | None], filled: Filled) -> Any:
        """A seat, or `Called`."""
        seat, now = filled.seat, [list(own) for own in banks]  # which nobody frees until it is launched
        if seat is None:
            return self._called(now, filled)
        try:
            fit(seat, now)
        except CaptureError as e:
            LOG.warning("called as JAX does, from now on where it would have had this seat: %s", e)
            filled.seat = None
            return self._called(now, filled)
        seat.launch()
        return seat

    def _called(self, banks: list[list[jax.Array]], filled: Filled) -> Called:
        outputs = []
        for part, bank, given in zip(self._parts, banks, filled.arguments, strict=True):
            into = [np.zeros(own.shape, own.dtype) for own in part.results]
            with Recording.alone:
                *results, _ = part.made.compiled([bank], given.copy(), into)
                if LATER:
                    jax.block_until_ready(results)
            outputs.append(part.frame.returned.as_packed(results))
        return Called(outputs)

    def make_ready(self, banks: Sequence[Sequence[jax.Array]]) -> None:
        """So that no seat has to be captured when it is needed."""
        for filled in list(self.free):
            fit(filled.seat, banks)

    def send_back(self, outputs: Any) -> None:
        if isinstance(outputs, Called):
            for part, own in zip(self._parts, outputs.outputs, strict=True):
                part.frame.returned.send(own)

    def leaves_here(self, outputs: Any) -> bool:
        return isinstance(outputs, Seat)

    def looks(self, outputs: Any) -> Callable[[], bool]:
        if isinstance(outputs, Seat):
            return outputs.is_ready
        each = [super(CapturedExecutable, self).looks(own) for own in outputs.outputs]
        return lambda: all([is_ready() for is_ready in each])

    def fetch(self, outputs: Any) -> list[Any]:
        if isinstance(outputs, Seat):
            outputs.wait()
            return [berth.results() for berth in outputs.berths]
        return [
            shown
            for part, own in zip(self._parts, outputs.outputs, strict=True)
            for shown in part.frame.returned.fetch(own)
        ]

    def take_back(self, filled: Filled) -> None:
        if filled.seat is not None:
            self.free.append(filled)

    def take_back_failed(self, filled: Filled) -> None:
        if filled.seat is None:
            return
        try:
            filled.seat.settle()
        except Exception as e:
            LOG.info("memory of a call that failed is left alone: %s: %s", type(e).__name__, e)
            lost.append(filled)
            return
        self.free.append(filled)


def filled_of(seat: Seat | None, parts: Sequence[Part]) -> Filled:
    """A seat's memory, or some of the host's, of zeros. It holds the seat, which does not hold it: what only the
    collector finds would stay."""
    if seat is None:
        buffers = [np.zeros(part.frame.staging.structs.size, WORD) for part in parts]
    else:
        buffers = [berth.given for berth in seat.berths]
    each = [part.frame.staging.over(buffer) for part, buffer in zip(parts, buffers, strict=True)]
    for own in each:
        own.clear()
    filled = Filled(buffers, [given for own in each for given in own.given], [0] * len(parts))
    filled.seat = seat
    return filled


class Capturing:
    """Makes executables, captured where they can be, if there are clients for it; called on any thread. `aside_at`
    gives those of entries by number, which run at once."""

    def __init__(self, aside_at: Callable[[int], Aside | None]) -> None:
        self._aside_at = aside_at
        self._never: WeakSet[Template] = WeakSet()  # what was tried and does what no CUDA graph can
        self._made: WeakValueDictionary[Any, Made] = WeakValueDictionary()  # by program, width and capacity

    @property
    def can(self) -> bool:
        """Whether anything can be."""
        return self._aside_at(0) is not None

    def made(self, lanes: Sequence[Lanes], make: Make = make_here) -> Executable:
        if self.can and may_capture(lanes) and not any(own.program in self._never for own in lanes):
            try:
                return self._captured(lanes, make)
            except CaptureError as e:
                LOG.info("called as JAX does: %s", e)
                if len(lanes) == 1 and not isinstance(e, NoSeat) and "RESOURCE_EXHAUSTED" not in str(e):
                    self._never.add(lanes[0].program)
        return compile_executable(lanes, make=make)

    def _captured(self, lanes: Sequence[Lanes], make: Make) -> CapturedExecutable:
        """Raises CaptureError, if a program does what no CUDA graph can, or there is no memory."""
        parts = [self._part(own, number, make) for number, own in enumerate(lanes)]
        seats = [Seat(parts) for _ in range(SEATS)]
        # Nothing is read now, so the banks may lie anywhere. The first time loads the program's code.
        somewhere = seats[0].address
        nowhere = [[Place(somewhere, struct) for struct in own.schema.structs(own.capacity)] for own in lanes]
        seats[0].capture(nowhere)
        return CapturedExecutable(lanes, parts, seats)

    def _part(self, own: Lanes, number: int, make: Make) -> Part:
        frame, aside = frame_of([own], packed=True, captured=True), self._aside_at(number)
        if not frame.staging.packed or aside is None:
            raise CaptureError("what it is given cannot lie in one buffer")
        key = own.program, own.width, own.capacity
        made = self._made.get(key)
        if made is None:
            try:
                with J.precision_as_traced():
                    made = Made(make(partial(captured_recipe, own._replace(schema=own.schema.bank))))
            except RuntimeError as e:  # of XLA: if it is the program's fault it fails without a capture too
                raise NoSeat(f"the program cannot be compiled so: {type(e).__name__}: {e}") from e
            self._made[key] = made
        return Part(frame, made, aside.load(made.compiled), aside)


def may_capture(lanes: Sequence[Lanes]) -> bool:
    """Whether it is worth trying."""
    whole = all(len(own.segments) == 1 and not own.schema.options.as_it_is for own in lanes)
    plain = all(own.program.takes_zeros for own in lanes)  # no loop that looks at a value, and nothing calls back
    parts = [part for own in lanes for part in own.program.outputs]
    return whole and plain and bool(parts) and not any(is_narrow(part.dtype) for part in parts)


def captured_recipe(own: Lanes) -> Jitted:
    bundle = bundle_of([own])
    staging, _, returned = frame_of([own], packed=True, captured=True)

    def serve(banks: Sequence[Sequence[Any]], arguments: Any, into: Any) -> list[Any]:
        given = staging.unpack(arguments)
        arrays = picked(bundle, [own], banks, [each.slots for each in given])
        outputs = returned.pack(run_stacked(bundle, arrays, [each.inputs for each in given]))
        return [x for each in outputs for x in each]

    structs = [own.schema.structs(own.capacity)], staging.structs, returned.structs
    jitted = jax.jit(ends(serve), donate_argnums=INTO, keep_unused=True)
    return Jitted(jitted, structs, (INTO,), captured=True)
