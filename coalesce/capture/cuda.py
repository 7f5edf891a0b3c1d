"""CUDA's driver, for one device, in the context that JAX uses too.

    with cuda:                                       the context is this thread's
        cuda("cuGraphLaunch", graph, stream)         keeps the interpreter's lock: it is a matter of microseconds
        cuda.wait("cuStreamSynchronize", stream)     gives it away

To give the lock away and to get it back takes longer than most calls, where other threads want it. Raises RuntimeError
with the driver's code where that says so.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import byref, c_int, c_size_t, c_uint64, c_void_p
from functools import cache
from typing import Any
from weakref import finalize

import numpy as np

LIBRARY = "libcuda.so.1"
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it waits for nothing else
NO_TIMING, BLOCKING = 2, 1  # flags of events: whoever waits for one looks for it all the time, or sleeps
BY_ANY_THREAD = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
NOT_READY = 600  # CUDA_ERROR_NOT_READY

LOG = logging.getLogger("coalesce")


class Cuda:
    """`library` keeps the interpreter's lock in its functions, `waiting` is the same and does not."""

    def __init__(self, library: Any, waiting: Any, ordinal: int) -> None:
        self.library, self.waiting, self._context, device = library, waiting, c_void_p(), c_int()
        self("cuDeviceGet", byref(device), ordinal)
        self("cuDevicePrimaryCtxRetain", byref(self._context), device)

    def __call__(self, name: str, *arguments: Any) -> None:
        check(name, getattr(self.library, name)(*arguments))

    def wait(self, name: str, *arguments: Any) -> None:
        """The same of what takes long."""
        check(name, getattr(self.waiting, name)(*arguments))

    def __enter__(self) -> None:
        self("cuCtxPushCurrent_v2", self._context)

    def __exit__(self, *_: object) -> None:
        self("cuCtxPopCurrent_v2", byref(c_void_p()))

    # Within its context

    def stream(self) -> c_void_p:
        """A new one."""
        made = c_void_p()
        self("cuStreamCreate", byref(made), NON_BLOCKING)
        return made

    def event(self, sleeps: bool = False) -> Owned:
        """A new one; `sleeps`: whoever waits for it leaves its processor to others, and is woken up."""
        made = c_void_p()
        self("cuEventCreate", byref(made), NO_TIMING | (BLOCKING if sleeps else 0))
        return Owned(self, "cuEventDestroy_v2", made)

    def copy(self, to: int, source: int, nbytes: int, stream: c_void_p) -> None:
        """From anywhere to anywhere: page-locked memory of the host has an address of its own."""
        self("cuMemcpyAsync", c_void_p(to), c_void_p(source), c_size_t(nbytes), stream)

    def memory(self, nbytes: int) -> Owned:
        """Of the device."""
        made = c_void_p()
        self.wait("cuMemAlloc_v2", byref(made), c_size_t(max(nbytes, 1)))
        return Owned(self, "cuMemFree_v2", made)

    def host_memory(self, count: int, dtype: np.dtype) -> np.ndarray:
        """Of the host, page-locked: the device copies it by itself. It is there as long as somebody looks at it."""
        made, nbytes = c_void_p(), max(count * dtype.itemsize, 1)
        self.wait("cuMemHostAlloc", byref(made), c_size_t(nbytes), 0)
        seen: Any = (ctypes.c_uint8 * nbytes).from_address(made.value or 0)
        seen.owner = Owned(self, "cuMemFreeHost", made)
        return np.frombuffer(seen, dtype, count)

    def executable(self, graphs: list[c_void_p]) -> c_void_p:
        """One CUDA graph that runs these at once, ready to be launched."""
        made, whole, node = c_void_p(), c_void_p(), c_void_p()
        if len(graphs) == 1:
            self.wait("cuGraphInstantiateWithFlags", byref(made), graphs[0], c_uint64(0))
            return made
        self("cuGraphCreate", byref(whole), 0)
        try:
            for graph in graphs:
                self("cuGraphAddChildGraphNode", byref(node), whole, None, c_size_t(0), graph)
            self.wait("cuGraphInstantiateWithFlags", byref(made), whole, c_uint64(0))
        finally:
            self("cuGraphDestroy", whole)
        return made


def check(name: str, code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA's driver answered {name} with error {code}; the device may be lost")


def follows(stream: int, x: Any) -> bool:
    """Make a stream wait for an array of JAX's; whether JAX did. It has no word in DLPack for some dtypes, and errors
    of its own for whoever waits."""
    try:
        x.__dlpack__(stream=stream)
    except Exception:
        return False
    return True


class Owned:
    """What the driver has made: memory, an event, a graph. It is given back when nobody holds it any more, but not when
    the interpreter ends."""

    def __init__(self, cuda: Cuda, free: str, handle: c_void_p) -> None:
        self.handle = handle
        finalize(self, give_back, cuda, free, handle).atexit = False

    @property
    def address(self) -> int:
        """Of memory."""
        return self.handle.value or 0


def give_back(cuda: Cuda, free: str, handle: c_void_p) -> None:
    with cuda:
        getattr(cuda.waiting, free)(handle)


@cache
def cuda_of(device: Any) -> Cuda | None:
    """That of a JAX device; None of one that is no NVIDIA GPU, or where the driver cannot be had."""
    if "cuda" not in device.client.platform_version or device.local_hardware_id is None:
        return None
    try:
        return Cuda(ctypes.PyDLL(LIBRARY), ctypes.CDLL(LIBRARY), device.local_hardware_id)
    except (OSError, AttributeError, RuntimeError) as e:
        LOG.info("%s is left to JAX: %s: %s", device, type(e).__name__, e)
        return None
