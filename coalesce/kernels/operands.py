"""What a launch reads beside its left operands, and where: arrays, in slabs too, rows picked, steps of loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from coalesce.kernels.triton import load
from coalesce.slab import Cut, Picked, Turn


@dataclass(frozen=True)
class Source:
    """What a kernel reads a row of an array from: the array itself, or the slab that it lies in; or [rows, steps,
    size], of which it reads one step."""

    ref: Any
    start: int | None
    row: Any
    step: Any = None

    def load(self, place: tuple[Any, ...], length: int, mask: Any) -> Any:
        """The elements of the row, or of its step, at `place`: (i,), or (i, j) where j counts to `length`."""
        if self.start is None and self.step is None:
            return load(self.ref, (self.row, *place), mask)
        flat = place[0] if len(place) == 1 else place[0] * length + place[1]
        flat = flat + self.start if self.start else flat
        return load(self.ref, (self.row, flat) if self.step is None else (self.row, self.step, flat), mask)


@dataclass(frozen=True)
class Operands:
    """What a launch gets for arrays, cuts, rows of these that are picked, and steps: slots, if any are; the step, if
    any is; the arrays to read from; and for each where in it to begin, whether problem p reads row slots[p] of it
    rather than row p, and whether it reads one step of that."""

    slots: tuple[Any, ...]
    step: tuple[Any, ...]
    arrays: tuple[Any, ...]
    starts: tuple[int | None, ...]
    picked: tuple[bool, ...]
    stepped: tuple[bool, ...]

    @property
    def scalars(self) -> tuple[Any, ...]:
        """What a launch gets before all else."""
        return (*self.slots, *self.step)

    def sources(self, refs: Sequence[Any], scalars: Sequence[Any], problem: Any) -> list[Source]:
        """Where a problem reads each, from references to `arrays` and to `scalars`."""
        row = scalars[0][problem] if self.slots else problem
        step = scalars[-1][0] if self.step else None
        each = zip(refs, self.starts, self.picked, self.stepped, strict=True)
        return [
            Source(ref, start, row if picked else problem, step if stepped else None)
            for ref, start, picked, stepped in each
        ]


def operands_of(values: Sequence[Any]) -> Operands:
    picked = [v for v in values if isinstance(v, Picked)]
    turns = [v for v in values if isinstance(v, Turn)]
    own = [v.array if isinstance(v, Picked) else v for v in values]
    return Operands(
        tuple(v.slots.astype(jnp.int32) for v in picked[:1]),  # of one family, whose lanes have one slot each
        tuple(jnp.reshape(v.at, (1,)).astype(jnp.int32) for v in turns[:1]),  # of one loop, whose step all of them read
        tuple(v.slab if isinstance(v, Cut) else v.steps if isinstance(v, Turn) else v for v in own),
        tuple(v.start if isinstance(v, Cut | Turn) else None for v in own),
        tuple(isinstance(v, Picked) for v in values),
        tuple(isinstance(v, Turn) for v in values),
    )
