"""Waiting for a GPU without being woken up.

JAX learns by a callback that a program has ended. CUDA runs it on a thread of its own, which has to wake up, and then
wakes whoever waits: on an H200's virtual machine each round of 8 LSTMs was told 75 to 95 us after its last kernel, and
177 us became 252 to 271. The driver itself can be asked. By DLPack's protocol a stream is made to wait for the event
that an array's program recorded, and a thread that synchronises with the stream looks for it until it is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from ctypes import byref, c_void_p
from functools import cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

from coalesce.capture.cuda import Cuda, cuda_of, follows, NON_BLOCKING

Tree = TypeVar("Tree")


def block_until_ready(tree: Tree) -> Tree:
    """As `jax.block_until_ready`: waits for every array in a pytree, and returns it. For an NVIDIA GPU it ends sooner,
    by up to 260 us where a host is slow to wake threads up, and keeps a processor busy meanwhile.

    Raises:
      RuntimeError: an array was deleted (donated?), or what computes it failed.
    """
    waiting: dict[Driver, list[Any]] = {}
    others: list[Any] = []
    for x in jax.tree.leaves(tree):
        driver = driver_of(x)
        if driver is None or x.is_ready():  # or it has failed
            others.append(x)
        else:
            waiting.setdefault(driver, []).append(x)
    for driver, arrays in waiting.items():
        others += driver.wait(arrays)
    jax.block_until_ready(others)
    return tree


def driver_of(x: Any) -> Driver | None:
    """The driver of the one GPU that an array lies on; None of what is no array, or where JAX has to be asked."""
    if not isinstance(x, jax.Array) or isinstance(x, Tracer) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return None
    device, *more = x.sharding.device_set
    return driver_at(device) if device.platform == "gpu" and not more else None


class Driver:
    """Streams of one device to wait on."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._streams: deque[int] = deque()  # that nobody uses: as many as ever waited at once

    def wait(self, arrays: Iterable[Any]) -> list[Any]:
        """Until all are there but those of which JAX would not say when: these. All, where there is no stream."""
        with self._cuda:
            stream = self._free_stream()
            if not stream:
                return list(arrays)
            left = [x for x in arrays if not follows(stream, x)]
            self._cuda.wait("cuStreamSynchronize", c_void_p(stream))
            self._streams.append(stream)
            return left

    def _free_stream(self) -> int:
        """0 if there is none and none can be made, as without memory: JAX waits without, and says if more is wrong."""
        try:
            return self._streams.pop()
        except IndexError:
            stream = c_void_p()
            failed = self._cuda.library.cuStreamCreate(byref(stream), NON_BLOCKING)
            return 0 if failed else stream.value or 0


@cache
def driver_at(device: Any) -> Driver | None:
    cuda = cuda_of(device)
    return None if cuda is None else Driver(cuda)
