"""The bank of a schema: weights on the device by slot, written in place while others are served, and growing.

    rows = store.prepare(fit)       a tenant's weights as they lie in the bank, on any thread
    slot = store.take()             a free slot, if any is
    store.write(slot, rows)         on the thread that dispatches, between two calls; so is store.grow(capacity)
    store.bank                      what a call reads: other arrays after every write

A write donates the arrays and changes them in place, after whatever was dispatched before has read them. Nothing
compiles in `write`, nor in `grow` after `make_ready`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from coalesce import jaxpr as J
from coalesce.bank import default_device, on_device, prepare_key
from coalesce.capture.aside import line_of
from coalesce.serving.fit import Fit
from coalesce.serving.making import Jitted, Make, make_here
from coalesce.serving.rows import leaves_of, rows_recipe
from coalesce.serving.schema import Schema

Rows = list[jax.Array]  # [1, ...] for each argument of the bank


class Store:
    """A bank with room for `capacity` tenants. `first` holds what they share: the rows of any tenant of the schema. Its
    own lie in slot 0 until somebody has that, for runs that nobody has asked for: a loop may not end on zeros."""

    def __init__(self, schema: Schema, capacity: int, first: Rows, make: Make = make_here) -> None:
        self.schema, self.capacity, self._make = schema, capacity, make
        self._owned = [i for i in range(len(schema.slabs)) if schema.owned(i)]
        self._free = list(range(capacity))
        self._writers: dict[int, Any] = {}  # by capacity
        self._growers: dict[tuple[int, int], list[Any]] = {}
        self.bank: list[jax.Array] = list(first)
        self._line = line_of(default_device()) if schema.options.captured else None  # who reads it without JAX
        self._replace(blank([schema.structs(capacity)[i] for i in self._owned], make))
        self.make_ready(capacity)
        self.write(0, first)

    @property
    def free(self) -> int:
        """How many slots are free."""
        return len(self._free)

    def take(self) -> int:
        """The lowest slot that is free; there must be one."""
        return heapq.heappop(self._free)

    def release(self, slot: int) -> None:
        heapq.heappush(self._free, slot)

    def write(self, slot: int, rows: Rows) -> None:
        """Put a tenant's weights into a slot, in place of whatever was there."""
        write = self._writers[self.capacity]
        with self._alone():
            self._replace(write([self.bank[i] for i in self._owned], [rows[i] for i in self._owned], np.int32(slot)))

    def make_ready(self, capacity: int) -> None:
        """Compile what it takes to grow to a capacity, and to write then; on any thread."""
        bank = [self.schema.structs(capacity)[i] for i in self._owned]
        rows = [self.schema.structs(1)[i] for i in self._owned]
        if capacity not in self._writers:
            self._writers[capacity] = self._make(partial(writer_recipe, bank, rows))
        change = (self.capacity, capacity)
        if capacity > self.capacity and change not in self._growers:
            old = [self.schema.structs(self.capacity)[i] for i in self._owned]
            self._growers[change] = [self._make(partial(grower_recipe, one, capacity)) for one in old]

    def grow(self, capacity: int) -> None:
        """Make room for more tenants; each keeps its slot. One array after the other, so that few lie twice."""
        self.make_ready(capacity)
        with self._alone():
            for i, grow in zip(self._owned, self._growers.pop((self.capacity, capacity)), strict=True):
                self.bank[i] = grow(self.bank[i])
        for slot in range(self.capacity, capacity):
            self.release(slot)
        self.capacity = capacity

    def let_go(self) -> None:
        """Nobody reads it any more: whoever still holds it, as the frames of an error do, holds no weights."""
        self.bank.clear()
        self._writers.clear()
        self._growers.clear()

    def bytes_to_grow(self, capacity: int) -> int:
        """What `grow` needs besides what is there, while it runs."""
        return (capacity - self.capacity) * self.schema.slot_bytes + max((x.nbytes for x in self.bank), default=0)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.bank)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """JAX knows nothing of who reads a bank without it: they have ended before it is written to, and begin after
        that."""
        if self._line is not None:
            self._line.wait()
        try:
            yield
        finally:  # also of what was written before something failed
            if self._line is not None:
                self._line.follow(self.bank)

    def _replace(self, owned: Iterable[jax.Array]) -> None:
        for i, array in zip(self._owned, owned, strict=True):
            self.bank[i] = array


def blank(structs: Sequence[jax.ShapeDtypeStruct], make: Make) -> list[jax.Array]:
    """Zeros. A program for them would be one more to lower and to compile, while others are served, just to save a CPU
    the copy."""
    if default_device().platform == "cpu":
        return [jax.device_put(np.zeros(s.shape, s.dtype), may_alias=False) for s in structs]
    return make(partial(blank_recipe, structs))()


def blank_recipe(structs: Sequence[jax.ShapeDtypeStruct]) -> Jitted:
    return Jitted(jax.jit(lambda: [jnp.zeros(s.shape, s.dtype) for s in structs]), ())


def writer_recipe(bank: list[jax.ShapeDtypeStruct], rows: list[jax.ShapeDtypeStruct]) -> Jitted:
    slot = jax.ShapeDtypeStruct((), np.int32)
    return Jitted(jax.jit(write_rows, donate_argnums=0), (bank, rows, slot), (0,))


def grower_recipe(old: jax.ShapeDtypeStruct, capacity: int) -> Jitted:
    return Jitted(jax.jit(partial(grown, capacity=capacity)), (old,))


def write_rows(bank: list[jax.Array], rows: Rows, slot: Any) -> list[jax.Array]:
    return [lax.dynamic_update_slice_in_dim(x, row, slot, 0) for x, row in zip(bank, rows, strict=True)]


def grown(array: jax.Array, capacity: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(jnp.zeros((capacity, *array.shape[1:]), array.dtype), array, 0, 0)


class Preparer:
    """Prepares tenants' weights; those that hold theirs in the same order share what was compiled for the first."""

    def __init__(self, schema: Schema, make: Make = make_here) -> None:
        self.schema, self._make = schema, make
        self._compiled: dict[Hashable, Callable[..., Rows]] = {}

    def __call__(self, fit: Fit) -> Rows:
        key = (tuple(map(prepare_key, fit.programs)), fit.sources)
        leaves = [on_device(own) for own in leaves_of(fit)]
        with J.precision_as_traced():
            if key not in self._compiled:
                structs = [[J.aval_struct(jax.typeof(x)) for x in own] for own in leaves]
                prepares = tuple(program.prepare for program in fit.programs)
                self._compiled[key] = self._make(partial(rows_recipe, self.schema.bank, prepares, fit.sources, structs))
            return self._compiled[key](leaves)


def free_bytes(held: Iterable[Any], limit: int | None = None) -> int | None:
    """What is left of `limit` bytes beside what is held, and on the device; None where neither is known."""
    left = [] if limit is None else [limit - sum(own.nbytes for own in held)]
    there = free_there()
    return min([*left, *([] if there is None else [there])], default=None)


def free_there() -> int | None:
    """What JAX's default device says."""
    stats = default_device().memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
