"""The arguments of a call besides weights, as arrays on the host to be filled: each entry's slots and inputs.

Where the device has memory of its own they lie in one buffer of 32-bit words, so that one transfer brings all of them;
a CPU reads them where they are, without a copy. So they belong to one call, and nobody writes to them after it.

    words   slots of entry 0 | its inputs, one [width, ...] after the other | slots of entry 1 | ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD = np.dtype(np.uint32)

Lane = tuple[int, Sequence[Any]]  # a slot of the bank, and an array for each input


class Buffers(NamedTuple):
    """What a call takes, and where in it each entry's slots [width] and inputs [width, ...] are to be written."""

    arguments: Any
    slots: list[np.ndarray]
    inputs: list[list[np.ndarray]]


@dataclass(frozen=True, eq=False)
class Staging:
    """`inputs[e]` are those of entry e with all lanes, [width, ...]."""

    widths: tuple[int, ...]
    inputs: tuple[tuple[jax.ShapeDtypeStruct, ...], ...]
    packed: bool

    @cached_property
    def parts(self) -> list[list[jax.ShapeDtypeStruct]]:
        """The slots of each entry and its inputs."""
        slots = [jax.ShapeDtypeStruct((width,), np.int32) for width in self.widths]
        return [[own, *inputs] for own, inputs in zip(slots, self.inputs, strict=True)]

    @property
    def structs(self) -> Any:
        if not self.packed:
            return self.parts
        return jax.ShapeDtypeStruct((sum(words(part) for own in self.parts for part in own),), WORD)

    def buffers(self) -> Buffers:
        """New ones, of which nothing is written."""
        if not self.packed:
            views = [[np.empty(part.shape, part.dtype) for part in own] for own in self.parts]
            return Buffers(views, [own[0] for own in views], [own[1:] for own in views])
        buffer, start = np.empty(self.structs.shape, WORD), 0
        views = []
        for own in self.parts:
            views.append([])
            for part in own:
                place = buffer[start : start + words(part)]
                views[-1].append(place.view(np.uint8)[: nbytes(part)].view(part.dtype).reshape(part.shape))
                start += words(part)
        return Buffers(buffer, [own[0] for own in views], [own[1:] for own in views])

    def fill(self, entries: Sequence[Sequence[Lane]]) -> Any:
        """The arguments for some lanes of each entry, at least one and in this order. What is left of its width repeats
        the slot of the first, with inputs of zeros."""
        buffers = self.buffers()
        for lanes, slots, inputs in zip(entries, buffers.slots, buffers.inputs, strict=True):
            slots[: len(lanes)] = [slot for slot, _ in lanes]
            slots[len(lanes) :] = lanes[0][0]
            for k, stack in enumerate(inputs):
                for i, (_, own) in enumerate(lanes):
                    stack[i] = own[k]
                stack[len(lanes) :] = 0
        return buffers.arguments

    def unpack(self, arguments: Any) -> list[list[Any]]:
        """Inside the program: the slots of each entry and its inputs."""
        if not self.packed:
            return arguments
        found, start = [], 0
        for own in self.parts:
            found.append([])
            for part in own:
                found[-1].append(from_words(arguments[start : start + words(part)], part))
                start += words(part)
        return found


def nbytes(part: jax.ShapeDtypeStruct) -> int:
    return part.size * part.dtype.itemsize


def words(part: jax.ShapeDtypeStruct) -> int:
    return -(-nbytes(part) // WORD.itemsize)


def from_words(x: Any, part: jax.ShapeDtypeStruct) -> Any:
    """An array out of the words that hold its bytes."""
    dtype = jnp.dtype(jnp.uint8 if part.dtype == np.bool_ else part.dtype)
    if dtype.itemsize > WORD.itemsize:
        x = x.reshape(-1, dtype.itemsize // WORD.itemsize)
    x = lax.bitcast_convert_type(x, dtype).reshape(-1)[: part.size].reshape(part.shape)
    return x != 0 if part.dtype == np.bool_ else x


def can_pack(structs: Sequence[jax.ShapeDtypeStruct]) -> bool:
    """Whether all of them can be made out of words again."""
    return not any(jnp.issubdtype(s.dtype, jnp.complexfloating) for s in structs)
