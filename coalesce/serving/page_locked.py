"""Memory of the host that a device reads by itself, to write into.

What lies in other memory is copied once more on its way to a device, by the host. JAX keeps arrays in page-locked
memory too (`pinned_host`), but has no way to change one. Here one is written to through its address, which nobody else
has: only as long as no transfer from it is under way, and never read as an array. To send one is a call of its own,
which costs more than it saves where there is little to send.

A program may leave its results in such memory, too. They are read where they lie: JAX would have the device copy them
once more. `can_leave` tries that.

`jax.device_put` finds out anew at each call what there is to do, and holds the interpreter's lock for 110 to 160 us
on a GPU's host; the transfer that it asks jaxlib for takes 20 to 50. Where jaxlib has that call, it is made here.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from coalesce import jaxpr as J
from coalesce.bank import default_device
from coalesce.waiting import block_until_ready

KIND = "pinned_host"
LITTLE = 256 * 2**10  # bytes
ENOUGH = 4  # processors: for clients, the driver, whatever the device's own driver does, and who waits

Wait = Callable[[jax.Array], Any]

LOG = logging.getLogger("coalesce.runtime")


class Locked(NamedTuple):
    view: np.ndarray  # to write into
    array: jax.Array  # the same memory
    at: Any  # the device
    there: SingleDeviceSharding  # of what is sent
    aval: Any  # of what is sent: the array's own says that it is on the host

    def sent(self) -> jax.Array:
        """On its way to the device; what is in the view must stay until it has arrived."""
        if J.batched_device_put is None:
            return jax.device_put(self.array, self.there)
        return J.batched_device_put(self.aval, self.there, [self.array], [self.at])


def page_locked(count: int, dtype: np.dtype) -> Locked | None:
    """So many zeros for JAX's default device; None for few, or where it has no such memory or does not send them."""
    if count * dtype.itemsize < LITTLE:
        return None
    device = default_device()
    if KIND not in [memory.kind for memory in device.addressable_memories()]:
        return None
    try:
        array = jax.device_put(np.zeros(count, dtype), SingleDeviceSharding(device, memory_kind=KIND))
        address = jax.block_until_ready(array).unsafe_buffer_pointer()
        view = np.frombuffer((ctypes.c_uint8 * array.nbytes).from_address(address), dtype)
        there = SingleDeviceSharding(device)
        locked = Locked(view, array, device, there, jax.device_put(array, there).aval)
        return locked if is_sent(locked) else None
    except Exception as e:  # a backend may have the memory and lack one of these
        LOG.info("what goes to %s is copied twice: %s: %s", device, type(e).__name__, e)
        return None


def is_sent(locked: Locked) -> bool:
    """Whether the device gets what is written; leaves zeros."""
    locked.view[0], locked.view[-1] = 1, 2
    seen = np.asarray(locked.sent())
    locked.view[:] = 0
    return bool(seen[-1] == 2 and (len(seen) == 1 or seen[0] == 1))


def can_leave(device: Any) -> bool:
    """Whether a program for it can leave its results in page-locked memory of the host."""
    try:
        given = jax.device_put(np.arange(4, dtype=np.int32), device)
        left = jax.jit(lambda x: jax.device_put(x + 1, jax.memory.Space.Host))(given)
        return left.sharding.memory_kind == KIND and seen(left).tolist() == [1, 2, 3, 4]
    except Exception as e:  # as above
        LOG.info("results of %s are asked for: %s: %s", device, type(e).__name__, e)
        return False


def has_processors() -> bool:
    """Whether this process may use so many that one of them may be kept busy with waiting."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return count >= ENOUGH


def way_to_wait() -> Wait:
    """By the device's own driver, which keeps a processor busy, where there are enough of them."""
    return block_until_ready if has_processors() else jax.block_until_ready


def seen(x: jax.Array, wait: Wait = jax.block_until_ready) -> np.ndarray:
    """What a program has left in memory of the host, where it lies; waits until it is there."""
    wait(x)
    memory: Any = (ctypes.c_uint8 * x.nbytes).from_address(x.unsafe_buffer_pointer())
    memory.array = x  # which is there as long as somebody looks at it
    return np.ndarray(x.shape, x.dtype, memory)
