"""The values of lanes between two segments, which stay on the device: registers [slots, ...], changed in place.

    slot = pool.take()              when a lane begins
    pool.release(slot)              when it has ended; on any thread
    pool.registers                  what a call reads; those that it writes are others after it

A lane has one slot, in all registers of its program, from its first segment to its last. Which lanes a call takes
through a segment is said by their slots alone: none is moved or copied for it. Places of a call that no lane is at have
slots behind the last: they read zeros, and what they write is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from coalesce import jaxpr as J


class Pool:
    """Room for `slots` lanes. `life` counts how often all values were lost."""

    def __init__(self, structs: Sequence[jax.ShapeDtypeStruct], slots: int) -> None:
        self.structs, self.slots, self.life = tuple(structs), slots, 0
        self.suspect = False  # a call failed that may have had the registers
        self._free = deque(range(slots))
        self.registers: list[jax.Array] = self._blank()
        (self._device,) = self.registers[0].devices()

    def _blank(self) -> list[jax.Array]:
        shapes = pool_structs(self.structs, self.slots)
        return jax.jit(lambda: [jnp.zeros(s.shape, s.dtype) for s in shapes])()

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A slot that is free; there must be one."""
        assert self._free, f"all {self.slots} places for requests between two segments are taken"
        return self._free.popleft()

    def release(self, slot: int) -> None:
        self._free.append(slot)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.registers)

    def let_go(self) -> None:
        """Nobody is in it, or will be."""
        self.registers.clear()

    def restore(self) -> bool:
        """After a call that failed: whether the values were lost. Then they are zeros, and `life` is one more."""
        self.suspect = False
        try:
            jax.block_until_ready(self.registers)
        except Exception:  # whatever the call raised, or that the call has consumed them
            self.life += 1
            with jax.default_device(self._device):
                self.registers = self._blank()
            return True
        return False


def pool_structs(structs: Sequence[jax.ShapeDtypeStruct], slots: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((slots, *s.shape), s.dtype) for s in structs]


def read(register: Any, slots: Any, struct: jax.ShapeDtypeStruct) -> Any:
    """[L, ...]: the values of some lanes."""
    found = register.at[slots].get(mode="fill", fill_value=0)
    return J.set_weak_type(found, struct.weak_type)


def write(register: Any, slots: Any, values: Any) -> Any:
    return register.at[slots].set(values, mode="drop", unique_indices=True)
