"""The results of a call on their way to the host, each [width, ...], of all entries that are at their last segment.

Every transfer costs the host some 80 us, however little it brings. So where the device has memory of its own and there
are several, the program lays them side by side in one buffer of words, in which the host looks at them where they lie.
A program may also bring them into page-locked memory of the host itself, where they are read in place: to ask for them
holds the interpreter's lock for 0.1 ms on a GPU's host. On a CPU they lie where they were computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coalesce.serving.page_locked import seen, way_to_wait
from coalesce.serving.words import can_pack, is_narrow, to_words, views, WORD, words


@dataclass(frozen=True, eq=False)
class Returned:
    """`parts[e]` are the results of entry e; None, if that is at an earlier segment. `copied`: to be transferred."""

    parts: tuple[tuple[jax.ShapeDtypeStruct, ...] | None, ...]
    copied: bool
    left: bool = False  # the program itself may end with bringing them into page-locked memory of the host

    @cached_property
    def all_parts(self) -> list[jax.ShapeDtypeStruct]:
        return [part for own in self.parts if own is not None for part in own]

    @cached_property
    def packed(self) -> bool:
        """Whether they lie in one buffer."""
        return self.copied and len(self.all_parts) > 1 and can_pack(self.all_parts)

    @cached_property
    def structs(self) -> list[jax.ShapeDtypeStruct]:
        """What `pack` returns, of a program that is not cut."""
        if self.packed:
            return [jax.ShapeDtypeStruct((sum(map(words, self.all_parts)),), WORD)]
        return self.all_parts

    def as_packed(self, results: Sequence[jax.Array]) -> list[list[jax.Array]]:
        """What `pack` returns, of what lies side by side as `structs` says."""
        flat = iter(results)
        if self.packed:
            return [*([] for _ in self.parts), list(flat)]
        return [[] if own is None else [next(flat) for _ in own] for own in self.parts]

    def shown(self, arrays: Sequence[np.ndarray]) -> list[list[np.ndarray] | None]:
        """The results in what lies on the host as `structs` says."""
        flat = iter(views(arrays[0], self.all_parts) if self.packed else arrays)
        return [None if own is None else [next(flat) for _ in own] for own in self.parts]

    @cached_property
    def in_place(self) -> bool:
        """Whether the program brings them to the host, which reads them as they lie: numbers of less than a byte have
        one each in NumPy, and not there."""
        return self.left and not any(is_narrow(part.dtype) for part in self.all_parts)

    @cached_property
    def as_array(self) -> Callable[[Any], np.ndarray]:
        """Shows what a call has left; waits."""
        return partial(seen, wait=way_to_wait()) if self.in_place else np.asarray

    def pack(self, outputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Inside the program: what it returns for the outputs of each entry; the buffer behind them, if there is one,
        with nothing in the place of what is in it."""
        if not self.packed:
            ended = [part is not None for part in self.parts]
            return [self._placed(own) if ends else list(own) for ends, own in zip(ended, outputs, strict=True)]
        own_words = [to_words(x, part) for x, part in zip(self._results(outputs), self.all_parts, strict=True)]
        rest = [[] if part is not None else list(own) for part, own in zip(self.parts, outputs, strict=True)]
        return [*rest, self._placed([jnp.concatenate(own_words)])]

    def _placed(self, results: Sequence[Any]) -> list[Any]:
        """Inside the program: where the host looks for them."""
        return [jax.device_put(x, jax.memory.Space.Host) if self.in_place else x for x in results]

    def send(self, outputs: Sequence[Sequence[jax.Array]]) -> None:
        """So that results follow the last kernel to the host, instead of waiting until somebody asks for them."""
        if self.copied and not self.in_place:
            for x in outputs[-1] if self.packed else self._results(outputs):
                x.copy_to_host_async()

    def fetch(self, outputs: Sequence[Sequence[jax.Array]]) -> list[list[np.ndarray] | None]:
        """As NumPy arrays; waits."""
        if self.packed:
            return self.shown([self.as_array(outputs[-1][0])])
        results = self._results(outputs)
        if len(results) > 1 and not self.copied:  # else `send` has
            for x in results:
                x.copy_to_host_async()
        return self.shown([self.as_array(x) for x in results])

    def _results(self, outputs: Sequence[Sequence[Any]]) -> list[Any]:
        return list(chain.from_iterable(own for part, own in zip(self.parts, outputs, strict=True) if part is not None))
