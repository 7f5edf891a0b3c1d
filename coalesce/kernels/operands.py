"""What a launch reads beside its left operands, and where: arrays, in slabs too, rows picked, steps of loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from coalesce.kernels.triton import div, load, rem
from coalesce.slab import Cut, Picked, Turn


@dataclass(frozen=True)
class Source:
    """What a kernel reads a row of an array from: the array itself, or the slab that it lies in; or [rows, steps,
    size], of which it reads one step."""

    ref: Any
    start: Any  # None: it is no row of a slab
    row: Any
    step: Any = None

    def load(self, place: tuple[Any, ...], length: int, mask: Any) -> Any:
        """The elements of the row, or of its step, at `place`: (i,), or (i, j) where j counts to `length`."""
        if self.start is None and self.step is None:
            return load(self.ref, (self.row, *place), mask)
        flat = place[0] if len(place) == 1 else place[0] * length + place[1]
        flat = flat if isinstance(self.start, int) and not self.start else flat + self.start
        return load(self.ref, (self.row, flat) if self.step is None else (self.row, self.step, flat), mask)


@dataclass(frozen=True)
class Batched:
    """A cut, or rows that are picked of one, of which each holds `count` problems of `size` elements, one after the
    other."""

    rows: Any
    count: int
    size: int


@dataclass(frozen=True)
class Operands:
    """What a launch gets for arrays, cuts, rows of these that are picked, and steps: slots, if any are; the step, if
    any is; the arrays to read from; and for each where in it to begin, whether problem p reads row slots[p] of it
    rather than row p, whether it reads one step of that, and how many problems of how many elements a row holds."""

    slots: tuple[Any, ...]
    step: tuple[Any, ...]
    arrays: tuple[Any, ...]
    starts: tuple[int | None, ...]
    picked: tuple[bool, ...]
    stepped: tuple[bool, ...]
    held: tuple[tuple[int, int], ...]

    @property
    def scalars(self) -> tuple[Any, ...]:
        """What a launch gets before all else."""
        return (*self.slots, *self.step)

    def sources(self, refs: Sequence[Any], scalars: Sequence[Any], problem: Any) -> list[Source]:
        """Where a problem reads each, from references to `arrays` and to `scalars`."""
        step = scalars[-1][0] if self.step else None

        def source(ref: Any, start: int | None, picked: bool, stepped: bool, held: tuple[int, int]) -> Source:
            count, size = held
            row = div(problem, count)
            begin = start if start is None or count == 1 else start + rem(problem, count) * size
            return Source(ref, begin, scalars[0][row] if picked else row, step if stepped else None)

        each = zip(refs, self.starts, self.picked, self.stepped, self.held, strict=True)
        return [source(*own) for own in each]


def operands_of(values: Sequence[Any]) -> Operands:
    rows = [v.rows if isinstance(v, Batched) else v for v in values]
    picked = [v for v in rows if isinstance(v, Picked)]
    turns = [v for v in rows if isinstance(v, Turn)]
    own = [v.array if isinstance(v, Picked) else v for v in rows]
    return Operands(
        tuple(v.slots.astype(jnp.int32) for v in picked[:1]),  # of one family, whose lanes have one slot each
        tuple(jnp.reshape(v.at, (1,)).astype(jnp.int32) for v in turns[:1]),  # of one loop, whose step all of them read
        tuple(v.slab if isinstance(v, Cut) else v.steps if isinstance(v, Turn) else v for v in own),
        tuple(v.start if isinstance(v, Cut | Turn) else None for v in own),
        tuple(isinstance(v, Picked) for v in rows),
        tuple(isinstance(v, Turn) for v in rows),
        tuple((v.count, v.size) if isinstance(v, Batched) else (1, 0) for v in values),
    )
