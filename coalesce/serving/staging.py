"""The arguments of a call besides weights, as arrays on the host to be filled: each entry's slots and inputs, and where
lanes between two segments keep their values.

Where the device has memory of its own they lie in one buffer of 32-bit words, so that one transfer brings all of them,
without another copy if the buffer is in page-locked memory. When its call has ended another one gets it, since fresh
memory costs as much as filling it. A CPU reads arrays where they are, without a copy: there they belong to one call,
and nobody writes to them after it.

    words   slots of entry 0 | its states, if any | its inputs, one [width, ...] after another | slots of entry 1 | ...
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np

from coalesce.serving.gather import gather, is_worth_it, join
from coalesce.serving.page_locked import Locked, page_locked
from coalesce.serving.words import from_words, views, WORD, words

LOG = logging.getLogger("coalesce.runtime")

SPARES = 3  # so many calls of one executable are under way at a time, mostly


class Lane(NamedTuple):
    slot: int  # of the bank
    inputs: Sequence[Any]  # an array for each
    state: int = 0  # its slot of the pool, if its program has one


class Given(NamedTuple):
    """What a call brings for an entry: slots [width], states [width] if it has any, inputs [width, ...]."""

    slots: Any
    states: Any
    inputs: list[Any]


class Filled:
    """What one call brings: `arguments` for it, and where in them each entry's own lies."""

    __slots__ = ("_arguments", "_sent", "given", "locked", "seat", "used")

    def __init__(self, arguments: Any, given: list[Given], used: list[int], locked: Locked | None = None) -> None:
        self._arguments, self.given = arguments, given
        self.used = used  # lanes of each entry that may hold something else than zeros
        self.locked = locked  # where they lie, if the device reads it by itself
        self._sent: jax.Array | None = None  # what it reads there, or has read
        self.seat: Any = None  # whose memory it is, of an executable that was captured

    @property
    def arguments(self) -> Any:
        """On their way to the device, if they are to be sent."""
        if self.locked is None:
            return self._arguments
        self._sent = self.locked.sent()
        return self._sent

    def forget_sent(self) -> None:
        """The device has read it."""
        self._sent = None

    def wait_read(self) -> None:
        """Until the device reads it no more, whatever became of the call; raises if that cannot be known."""
        jax.block_until_ready(self._sent)

    def clear(self) -> None:
        """Of one buffer."""
        self._arguments[:] = 0
        self.used = [0] * len(self.used)


@dataclass(frozen=True, eq=False)
class Staging:
    """`inputs[e]` are those of entry e with all lanes, [width, ...]; `pools[e]` is the size of its pool, or 0;
    `repeats[e]`, whether lanes that nobody uses have the inputs of the first, instead of zeros."""

    widths: tuple[int, ...]
    inputs: tuple[tuple[jax.ShapeDtypeStruct, ...], ...]
    pools: tuple[int, ...]
    packed: bool
    repeats: tuple[bool, ...]
    _spare: deque[Filled] = field(default_factory=deque)  # of calls that have ended

    @cached_property
    def parts(self) -> list[list[jax.ShapeDtypeStruct]]:
        """The slots of each entry, its states if it has any, and its inputs."""
        slots = [[jax.ShapeDtypeStruct((width,), np.int32)] * (2 if pool else 1) for width, pool in self.shapes]
        return [[*own, *inputs] for own, inputs in zip(slots, self.inputs, strict=True)]

    @cached_property
    def plain(self) -> list[list[tuple[tuple[int, ...], np.dtype]]]:
        """`parts`, as NumPy asks for them: a struct takes longer to say so than the memory takes to be had."""
        return [[(part.shape, np.dtype(part.dtype)) for part in own] for own in self.parts]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return list(zip(self.widths, self.pools, strict=True))

    def given(self, parts: Sequence[Sequence[Any]]) -> list[Given]:
        """What stands for `parts`, by what it is."""
        return [
            Given(own[0], own[1] if pool else None, list(own[2 if pool else 1 :]))
            for own, pool in zip(parts, self.pools, strict=True)
        ]

    @property
    def structs(self) -> Any:
        if not self.packed:
            return self.parts
        return jax.ShapeDtypeStruct((sum(words(part) for own in self.parts for part in own),), WORD)

    def buffers(self, locked: Locked | None = None) -> Filled:
        """New ones, of which nothing is written; in that memory, if it is given."""
        if not self.packed:
            arrays = [[np.empty(shape, dtype) for shape, dtype in own] for own in self.plain]
            return Filled(arrays, self.given(arrays), list(self.widths))
        return self.over(np.empty(self.structs.shape, WORD) if locked is None else locked.view, locked)

    def over(self, buffer: np.ndarray, locked: Locked | None = None) -> Filled:
        """A buffer of words, of which nothing is written."""
        placed = iter(views(buffer, [part for own in self.parts for part in own]))
        given = self.given([[next(placed) for _ in own] for own in self.parts])
        return Filled(buffer, given, list(self.widths), locked)

    def make_ready(self) -> None:
        """Memory for the first calls, which were slower if they had to ask for it."""
        if not self.packed:
            return
        is_worth_it()  # to find out takes a few milliseconds
        for _ in range(SPARES):
            filled = self.buffers(page_locked(self.structs.size, WORD))
            filled.clear()
            self.take_back(filled)

    def fill(self, entries: Sequence[Sequence[Lane]]) -> Filled:
        """The arguments for some lanes of each entry, at least one and in this order. What is left of its width repeats
        the slot of the first, with inputs of zeros or its own, and has states behind the pool, all different."""
        try:
            filled = self._spare.pop()
        except IndexError:  # asked for instead of looked for: another thread may warm this executable up meanwhile
            filled = self.buffers()
        try:
            self.write(filled, entries)
        except Exception:
            self.take_back_failed(filled)
            raise
        return filled

    def write(self, filled: Filled, entries: Sequence[Sequence[Lane]]) -> None:
        """Into that one, as `fill` does."""
        try:
            self._write(filled, entries)
        except Exception:  # what lies in it now is not known
            filled.used[:] = self.widths
            raise

    def _write(self, filled: Filled, entries: Sequence[Sequence[Lane]]) -> None:
        for e, (lanes, (slots, states, inputs), pool) in enumerate(zip(entries, filled.given, self.pools, strict=True)):
            count, before = len(lanes), filled.used[e]
            slots[:count] = [lane.slot for lane in lanes]
            slots[count:] = lanes[0].slot
            if states is not None:
                states[:count] = [lane.state for lane in lanes]
                states[count:] = range(pool + count, pool + len(states))
            for k, stack in enumerate(inputs):
                rows = [lane.inputs[k] for lane in lanes]
                if not (join(rows, stack) or (self.packed and is_worth_it() and gather(rows, stack[:count]))):
                    for i, row in enumerate(rows):  # one call of NumPy for all of them is no quicker
                        stack[i] = row
                if self.repeats[e]:
                    stack[count:] = rows[0]
                elif before > count:
                    zero(stack[count:before])
            filled.used[e] = count

    def take_back(self, filled: Filled) -> None:
        """Its call has ended, and did not fail; called on any thread."""
        filled.forget_sent()
        if self.packed and (filled.locked is not None or len(self._spare) < SPARES):
            self._spare.append(filled)

    def take_back_failed(self, filled: Filled) -> None:
        """Its call has failed, or was never made. What is page-locked is made only once, so it is waited for; other
        memory may still be read, and there is more of it."""
        if filled.locked is None:
            return
        try:
            filled.wait_read()
        except Exception as e:  # then nothing is sent from it any more
            LOG.info("page-locked memory is lost with a transfer that failed: %s: %s", type(e).__name__, e)
            return
        self.take_back(filled)

    def unpack(self, arguments: Any) -> list[Given]:
        """Inside the program."""
        if not self.packed:
            return self.given(arguments)
        found, start = [], 0
        for own in self.parts:
            found.append([])
            for part in own:
                found[-1].append(from_words(arguments[start : start + words(part)], part))
                start += words(part)
        return self.given(found)


def zero(stack: np.ndarray) -> None:
    """By its bytes: NumPy sets one element after the other of a type that is not its own, such as bfloat16."""
    stack.reshape(-1).view(np.uint8)[:] = 0
