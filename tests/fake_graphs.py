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
    """Stands for libcuda. What is launched runs at once or, if that is `late`, when somebody waits for it."""

    def __init__(self, late: bool = False) -> None:
        self.calls: list[str] = []
        self.late = late
        self.queue: list[Callable[[], object]] = []
        self.memory: dict[int, Any] = {}  # by address
        self.graphs: dict[int, Callable[[], object]] = {}
        self.children: dict[int, list[int]] = {}  # of graphs of graphs
        self.broken: str = ""  # what fails

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.broken:
                return 700
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
        self.soon(lambda: ctypes.memmove(to.value, source.value, nbytes.value))

    def soon(self, does: Callable[[], object]) -> None:
        self.queue.append(does)
        if not self.late:
            self.do_cuStreamSynchronize()

    def do_cuStreamSynchronize(self, *_: Any) -> None:
        while self.queue:
            self.queue.pop(0)()

    do_cuEventSynchronize = do_cuEventQuery = do_cuStreamSynchronize

    def do_cuGraphCreate(self, made: Any, flags: int) -> None:
        made._obj.value = number = 1000 + len(self.children)
        self.children[number] = []
        self.graphs[number] = lambda: [self.graphs[child]() for child in self.children[number]]

    def do_cuGraphAddChildGraphNode(self, node: Any, graph: Any, _: Any, count: Any, child: Any) -> None:
        self.children[graph.value].append(child.value)

    def do_cuGraphInstantiateWithFlags(self, made: Any, graph: Any, flags: Any) -> None:
        made._obj.value = graph.value

    def do_cuGraphLaunch(self, graph: Any, stream: Any) -> None:
        self.soon(self.graphs[graph.value])


class FakeAside(Aside):
    """One client for everything."""

    def __init__(self, refuses: str = "", late: bool = False) -> None:
        self.library = Library(late)
        super().__init__(None, Line(Cuda(self.library, self.library, 0)))
        self.captured = 0
        self.refuses = refuses  # why nothing can be captured

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
