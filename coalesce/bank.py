"""The weights of a bundle on the device: each prepared once, laid out once, in one stacked array a weight, of which a
slab holds many.

A tenant is written by one jitted call: prepare its raw weights, lay each out, and put it into its row in place (the
arrays are donated). Rows that an earlier tenant wrote, because the two share them, are not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import SingleDeviceSharding

from coalesce import jaxpr as J
from coalesce.bundle import arguments, Array, Bundle
from coalesce.layout import Layout
from coalesce.program import Program
from coalesce.slab import Slab
from coalesce.structure import canonical

Entry = tuple[int, int | None, int, Layout]  # (argument, where in its rows if it is a slab, prepared weight, layout)


def bank_structs(bundle: Bundle) -> list[jax.ShapeDtypeStruct]:
    """What `build_bank` gives, without the values."""

    def struct(slab: Slab) -> jax.ShapeDtypeStruct:
        first = bundle.arrays[slab.arrays[0]]
        shape = (slab.size,) if len(slab.arrays) > 1 else first.shape
        return jax.ShapeDtypeStruct((len(first.rows), *shape), first.dtype)

    return [struct(slab) for slab in arguments(bundle)]


def build_bank(bundle: Bundle, programs: Sequence[Program]) -> list[jax.Array]:
    """One array for each of `arguments(bundle)`, on the default device."""
    structs = bank_structs(bundle)
    bank = jax.jit(lambda: [jnp.zeros(s.shape, s.dtype) for s in structs])()
    places_of = {
        array: (i, start if len(slab.arrays) > 1 else None)
        for i, slab in enumerate(arguments(bundle))
        for array, start in zip(slab.arrays, slab.starts, strict=True)
    }
    writers: dict[Any, Callable[..., list[jax.Array]]] = {}
    for tenant, places in places_by_tenant(bundle.arrays).items():
        program = programs[tenant]
        entries = tuple((*places_of[array], weight, bundle.arrays[array].layouts[row]) for array, row, weight in places)
        key = (prepare_key(program), entries)
        if key not in writers:
            writers[key] = writer(program, entries)
        chosen = [argument for argument, *_ in entries]
        rows = np.asarray([row for _, row, _ in places], np.int32)
        unique = list(dict.fromkeys(chosen))
        leaves = on_device([leaf.value for leaf in program.leaves])
        with J.precision_as_traced():
            written = writers[key]([bank[a] for a in unique], rows, leaves)
        for a, new in zip(unique, written, strict=True):
            bank[a] = new
    return bank


def default_device() -> Any:
    chosen = getattr(jax.config, "jax_default_device")  # noqa: B009, whose attributes type checkers do not see
    return chosen if hasattr(chosen, "platform") else jax.local_devices(backend=chosen)[0]


def on_device(values: Sequence[Any], device: Any = None) -> list[Any]:
    """The values, those that lie on other devices, or on a mesh, copied to that one, or to the default one."""
    device = default_device() if device is None else device

    def place(x: Any) -> Any:
        if not isinstance(x, jax.Array) or isinstance(x, Tracer):
            return x
        there = x.devices() == {device} and isinstance(x.sharding, SingleDeviceSharding)
        return x if there else jax.device_put(x, SingleDeviceSharding(device))  # a device keeps the mesh in its type

    return [place(x) for x in values]


def places_by_tenant(arrays: Sequence[Array]) -> dict[int, list[tuple[int, int, int]]]:
    """tenant -> [(array, row, prepared weight)]; each row is some one tenant's to write."""
    places: dict[int, list[tuple[int, int, int]]] = {}
    for a, array in enumerate(arrays):
        for row, (tenant, weight) in enumerate(array.rows):
            places.setdefault(tenant, []).append((a, row, weight))
    return places


def prepare_key(program: Program) -> Any:
    prepare = program.prepare
    return len(program.leaves) if prepare is None else canonical(prepare, positional=True).key


def writer(program: Program, entries: Sequence[Entry]) -> Callable[..., list[jax.Array]]:
    """(arrays, rows, raw weights) -> the arrays with one tenant's rows written."""
    position = {a: i for i, a in enumerate(dict.fromkeys(argument for argument, *_ in entries))}

    def write(arrays: list[jax.Array], rows: Any, leaves: list[Any]) -> list[jax.Array]:
        prepared = leaves if program.prepare is None else J.evaluate(program.prepare, leaves)
        arrays = list(arrays)
        for i, (argument, start, weight, layout) in enumerate(entries):
            at, row = position[argument], layout(jnp.asarray(prepared[weight]))
            if start is None:
                arrays[at] = lax.dynamic_update_index_in_dim(arrays[at], row, rows[i], 0)
            else:
                arrays[at] = lax.dynamic_update_slice(arrays[at], row.reshape(1, -1), (rows[i], np.int32(start)))
        return arrays

    return jax.jit(write, donate_argnums=0)
