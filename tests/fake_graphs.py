"""CUDA graphs on a CPU: its memory stands for the device's, and a launch runs what XLA has compiled."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from typing import Any

import jax
import numpy as np

from coalesce.capture import ending
from coalesce.capture.aside import Aside, check_order, is_place, Line, Place
from coalesce.capture.cuda import Cuda, Owned
from coalesce.capture.ending import Around, NOTHING, TARGET
from coalesce.errors import CaptureError

jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(ending.execute), platform="cpu")


class Library:
    """Stands for libcuda. What is launched runs at once or, if that is `late`, when somebody waits for it: as far as it
    must then have come, and nothing else."""

    def __init__(self, late: bool = False) -> None:
        self.calls: list[str] = []
        self.late = late
        self.queues: dict[int, list[Any]] = {}  # of streams: what is to be done, or the number of an event
        self.recorded: dict[int, int] = {}  # where each event was recorded last
        self.handles = 0
        self.memory: dict[int, Any] = {}  # by address
        self.graphs: dict[int, Callable[[], object]] = {}
        self.children: dict[int, list[int]] = {}  # of graphs of graphs
        self.broken: str = ""  # what fails
        self.codes: dict[str, int] = {}  # what else is answered, by what is called

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.broken or name in self.codes:
                return self.codes.get(name, 700)
            does = getattr(type(self), f"do_{name}", None)
            if does is not None:
                does(self, *arguments)
            return 0

        return call

    def do_cuMemAlloc_v2(self, made: Any, nbytes: Any, flags: int = 0) -> None:
        buffer = np.zeros(nbytes.value + 64, np.uint8)
        address = buffer.ctypes.data + -buffer.ctypes.data % 64
        self.memory[address] = buffer
        made._obj.value = address

    do_cuMemHostAlloc = do_cuMemAlloc_v2

    def do_cuMemFree_v2(self, at: Any) -> None:
        del self.memory[at.value]

    do_cuMemFreeHost = do_cuMemFree_v2

    def do_cuMemcpyAsync(self, to: Any, source: Any, nbytes: Any, stream: Any) -> None:
        self.soon(stream, lambda: ctypes.memmove(to.value, source.value, nbytes.value))

    def do_cuStreamCreate(self, made: Any, flags: int) -> None:
        self.handles += 1
        made._obj.value = self.handles

    do_cuEventCreate = do_cuStreamCreate

    @property
    def queue(self) -> list[Any]:
        """All that is still to be done."""
        return [does for own in self.queues.values() for does in own]

    def soon(self, stream: Any, does: Any) -> None:
        self.queues.setdefault(stream.value, []).append(does)
        if not self.late:
            self.do_cuStreamSynchronize(stream)

    def do_cuEventRecord(self, event: Any, stream: Any) -> None:
        self.recorded[event.value] = stream.value
        self.soon(stream, event.value)

    def do_cuStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> None:
        self.soon(stream, lambda: self.do_cuEventSynchronize(event))

    def do_cuStreamSynchronize(self, stream: Any) -> None:
        self.drain(stream.value)

    def do_cuEventSynchronize(self, event: Any) -> None:
        if event.value in self.recorded:
            self.drain(self.recorded[event.value], event.value)

    do_cuEventQuery = do_cuEventSynchronize

    def drain(self, stream: int, event: int = 0) -> None:
        """As far as the last time that the event was recorded, or all of it."""
        queue = self.queues.get(stream, [])
        count = len(queue) - queue[::-1].index(event) if event in queue else 0 if event else len(queue)
        for _ in range(count):
            does = queue.pop(0)
            if callable(does):
                does()

    def do_cuGraphCreate(self, made: Any, flags: int) -> None:
        made._obj.value = number = 1000 + len(self.children)
        self.children[number] = []
        self.graphs[number] = lambda: [self.graphs[child]() for child in self.children[number]]

    def do_cuGraphAddChildGraphNode(self, node: Any, graph: Any, _: Any, count: Any, child: Any) -> None:
        self.children[graph.value].append(child.value)

    def do_cuGraphInstantiateWithFlags(self, made: Any, graph: Any, flags: Any) -> None:
        made._obj.value = graph.value

    def do_cuGraphLaunch(self, graph: Any, stream: Any) -> None:
        self.soon(stream, self.graphs[graph.value])


class FakeAside(Aside):
    """One client for everything."""

    def __init__(self, refuses: str = "", late: bool = False) -> None:
        self.library = Library(late)
        super().__init__(None, Line(Cuda(self.library, self.library, 0)))
        self.captured = 0
        self.numbers: list[int] = []
        self.refuses = refuses  # why nothing can be captured

    def numbered(self, number: int) -> FakeAside:
        if number not in self.numbers:
            self.numbers.append(number)
        return self

    def load(self, compiled: Any) -> Any:
        check_order(compiled)
        return compiled

    def capture(self, loaded: Any, arguments: Any, into: Sequence[Place], around: Around = NOTHING) -> Owned:
        if self.refuses:
            raise CaptureError(self.refuses)
        self.captured += 1

        def run() -> None:
            for to, source, nbytes in around.before:
                ctypes.memmove(to, source, nbytes)
            given = jax.tree.map(lambda place: lying_at(place).copy(), arguments, is_leaf=is_place)
            *results, _ = loaded(*given, [lying_at(place).copy() for place in into])
            for place, x in zip(into, results, strict=True):
                lying_at(place)[...] = np.asarray(x)
            for to, source, nbytes in around.after:
                ctypes.memmove(to, source, nbytes)

        self.library.graphs[self.captured] = run
        return Owned(self.line.cuda, "cuGraphDestroy", c_void_p(self.captured))


def lying_at(place: Place) -> np.ndarray:
    dtype = np.dtype(place.struct.dtype)
    memory = (ctypes.c_uint8 * (place.struct.size * dtype.itemsize)).from_address(place.address)
    return np.frombuffer(memory, dtype).reshape(place.struct.shape)
