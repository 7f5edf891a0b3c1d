"""An executable: some lanes of one template, or of several, compiled to read their weights by slot.

    filled = executable.stage(entries)               the lanes of each entry -> arrays on the host
    outputs = executable.run(banks, pools, filled)   returns before the device is done
    results = executable.fetch(outputs)              waits
    executable.take_back(filled)                     for another call

Lane i of an entry is row i of its slots, inputs and outputs. Lanes beyond those that were given are padding; nothing
that they compute reaches another. They take zeros, or what the first lane takes where zeros might do harm (a loop that
does not end, a callback that raises). An entry may be one segment of a program: what it takes from the segments before
it, and leaves for those after it, lies in a pool.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax

from coalesce import jaxpr as J
from coalesce.bundle import Attention, Bundle, items, Loop, packs, Rowwise
from coalesce.kernels import FUSING
from coalesce.lower import run_stacked
from coalesce.passes.join_arrays import row_bytes, SMALL_ROW
from coalesce.serving.as_it_is import run_one
from coalesce.serving.fit import Template
from coalesce.serving.making import Jitted, Make, make_here
from coalesce.serving.pool import Pool
from coalesce.serving.returned import Returned
from coalesce.serving.schema import plan_lanes, Schema, weight_of
from coalesce.serving.segments import Segments
from coalesce.serving.staging import Filled, Lane, Staging
from coalesce.serving.states import States
from coalesce.serving.words import can_pack
from coalesce.slab import Cut, Picked


class Lanes(NamedTuple):
    """An entry of an executable: so many lanes of a program, whose weights lie in a bank of that capacity, at one of
    its segments; if there are several, with a pool of so many slots."""

    schema: Schema
    segments: Segments
    width: int
    capacity: int
    segment: int = 0
    slots: int = 0

    @property
    def program(self) -> Template:
        return self.segments.templates[self.segment]

    @property
    def is_last(self) -> bool:
        return self.segment + 1 == len(self.segments)


@dataclass(frozen=True, eq=False)
class Executable:
    lanes: tuple[Lanes, ...]
    staging: Staging
    states: States
    returned: Returned
    compiled: Any

    @cached_property
    def bundle(self) -> Bundle:
        """Of tenants that stand for the lanes: planned anew for whoever asks."""
        return bundle_of(self.lanes)

    @cached_property
    def ends(self) -> tuple[bool, ...]:
        """Of each entry, whether its outputs are results."""
        return tuple(own.is_last for own in self.lanes)

    def stage(self, entries: Sequence[Sequence[Lane]]) -> Filled:
        """What `run` takes for some lanes of each entry."""
        return self.staging.fill(entries)

    def run(
        self, banks: Sequence[Sequence[jax.Array]], pools: Sequence[Pool | None], filled: Filled
    ) -> list[list[jax.Array]]:
        """What `fetch` takes (`Returned.pack`); of an entry at an earlier segment than the last something to wait for.
        `banks[e]` is the bank of its schema as it is now, `pools[e]` the pool of its program, if that is cut."""
        states = self.states
        if not states.kept and not states.written:  # most programs are not cut
            _, outputs = self.compiled(banks, [], [], filled.arguments)
            return outputs
        kept, written = (states.arrays(places, pools) for places in (states.kept, states.written))
        after, outputs = self.compiled(banks, kept, written, filled.arguments)
        states.store(pools, after)
        return outputs

    def send_back(self, outputs: list[list[jax.Array]]) -> None:
        """So that results follow the last kernel to the host, instead of waiting until somebody asks for them."""
        self.returned.send(outputs)

    def looks(self, outputs: list[list[Any]]) -> Callable[[], bool]:
        """What says whether `fetch` returns at once, or raises."""
        last = [own[-1] for own in outputs if own]
        return lambda: all([x.is_ready() for x in last])

    def leaves_here(self, outputs: Any) -> bool:
        """Whether they are on the host as soon as the device is done, wherever that is."""
        return False

    def make_ready(self, banks: Sequence[Sequence[jax.Array]]) -> None:
        """For calls that read these banks, as far as anything is to be done ahead of them."""

    def take_back(self, filled: Filled) -> None:
        """What was staged for a call that has ended, and did not fail; nobody reads it any more."""
        self.staging.take_back(filled)

    def take_back_failed(self, filled: Filled) -> None:
        """What was staged for a call that failed."""
        self.staging.take_back_failed(filled)

    def fetch(self, outputs: list[list[jax.Array]]) -> list[Any]:
        """The results [width, ...] of each entry as NumPy arrays; None of a segment that is not the last."""
        return self.returned.fetch(outputs)


class Frame(NamedTuple):
    """How an executable is called."""

    staging: Staging
    states: States
    returned: Returned


class Traced(NamedTuple):
    """An executable before it is lowered for a platform."""

    bundle: Bundle
    states: States
    function: Any  # JAX's Traced


WRITTEN = 2  # the argument that is donated


def compile_executable(lanes: Sequence[Lanes], packed: bool | None = None, make: Make = make_here) -> Executable:
    """Plan and compile; `packed` as in `frame_of`."""
    frame = frame_of(lanes, packed)
    with J.precision_as_traced():
        made = make(partial(executable_recipe, tuple(own._replace(schema=own.schema.bank) for own in lanes), packed))
    frame.staging.make_ready()
    return Executable(tuple(lanes), *frame, made)


def trace_executable(lanes: Sequence[Lanes], packed: bool | None = None) -> Traced:
    """To look at; `packed` as in `frame_of`."""
    with J.precision_as_traced():
        jitted = executable_recipe(lanes, packed)
        return Traced(bundle_of(lanes), frame_of(lanes, packed).states, jitted.function.trace(*jitted.arguments))


def frame_of(lanes: Sequence[Lanes], packed: bool | None, captured: bool = False) -> Frame:
    """`packed` says whether what a call brings lies in one buffer, and what it gives back; None: unless it runs on a
    CPU. Whoever is `captured` leaves nothing on the host by itself."""
    inputs = [() if own.segment else stacks(own.program.inputs, own.width) for own in lanes]
    packed = lanes[0].schema.options.platform != "cpu" if packed is None else packed
    staging = Staging(
        tuple(own.width for own in lanes),
        tuple(inputs),
        tuple(own.slots if len(own.segments) > 1 else 0 for own in lanes),
        packed and all(map(can_pack, inputs)),
        tuple(not own.program.takes_zeros for own in lanes),
    )
    states = States(
        tuple(own.segments for own in lanes), tuple(own.segment for own in lanes), tuple(own.slots for own in lanes)
    )
    returned = Returned(
        tuple(stacks(own.program.outputs, own.width) if own.is_last else None for own in lanes),
        copied=packed,
        left=packed and lanes[0].schema.options.left and not captured,
    )
    return Frame(staging, states, returned)


def bundle_of(lanes: Sequence[Lanes]) -> Bundle:
    steps = plan_lanes([(own.schema, own.program, own.width) for own in lanes], [held(own.schema) for own in lanes])
    return steps[-1].bundle


def executable_recipe(lanes: Sequence[Lanes], packed: bool | None) -> Jitted:
    bundle = bundle_of(lanes)
    as_it_is = lanes[0].schema.options.as_it_is
    assert not as_it_is or lanes[0].width == 1, f"{lanes[0].width} lanes of a program that runs as it is"
    cut = [own.segments for own in lanes if own.slots]
    assert len(set(cut)) == len(cut), "two segments of one program in one executable, whose pool would be copied"
    staging, states, returned = frame_of(lanes, packed)

    def serve(banks: Sequence[Sequence[Any]], kept: Any, written: Any, arguments: Any) -> tuple[list[Any], list[Any]]:
        given = staging.unpack(arguments)
        places = [own.states for own in given]
        values = states.read(kept, places)
        arrays = picked(bundle, lanes, banks, [own.slots for own in given])
        taken = [v if own.segment else g.inputs for own, v, g in zip(lanes, values, given, strict=True)]
        outputs = [run_one(lanes[0].program, arrays, taken[0])] if as_it_is else run_stacked(bundle, arrays, taken)
        after = states.write(written, places, outputs)
        last = [x if own.is_last else [g.slots[0]] for own, x, g in zip(lanes, outputs, given, strict=True)]
        return after, returned.pack(last)

    registers = [states.structs(places) for places in (states.kept, states.written)]
    banks = [own.schema.structs(own.capacity) for own in lanes]
    return Jitted(jax.jit(serve, donate_argnums=WRITTEN), (banks, *registers, staging.structs), (WRITTEN,), often=True)


def stacks(values: Sequence[jax.ShapeDtypeStruct], width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct((width, *x.shape), x.dtype) for x in values)


def held(schema: Schema) -> dict[int, list[Any]]:
    """The layouts of each weight in the bank."""
    found: dict[int, list[Any]] = {}
    for weight, layout in schema.places:
        found.setdefault(weight, []).append(layout)
    return found


def picked(bundle: Bundle, lanes: Sequence[Lanes], banks: Sequence[Sequence[Any]], slots: Sequence[Any]) -> list[Any]:
    """Each array of the bundle: what is shared as it lies; what is each tenant's own picked by slot, where something
    reads it so, and else read once, ahead of all loops."""
    ends: list[int] = []
    for own in lanes:
        ends.append(own.width + (ends[-1] if ends else 0))
    by_slot = read_by_slot(bundle)

    def one(index: int) -> Any:
        array = bundle.arrays[index]
        entry = bisect_right(ends, array.rows[0][0])
        schema, key = lanes[entry].schema, weight_of(array)
        place = schema.places[key]
        bank = banks[entry][place.argument]
        if not schema.own[key[0]]:
            return bank
        rows = Picked(Cut(bank, place.start, array.shape), slots[entry])
        return rows if index in by_slot else rows.read()

    return [one(i) for i in range(len(bundle.arrays))]


def read_by_slot(bundle: Bundle) -> set[int]:
    """The arrays that have readers which pick rows out of the bank: kernels, their epilogues, attention for what its
    operands are made of, work on rows, and scans over layers, of which a step reads no more than its own."""
    own = [pack for pack in packs(bundle.schedule) if pack.kernel in FUSING]
    found = {pack.array for pack in own if pack.array is not None}
    others = any(isinstance(item, Attention | Rowwise) for item in items(bundle.schedule))
    if others or any(pack.epilogue for pack in own):
        found |= {i for i in bundle.stored.values() if row_bytes(bundle.arrays[i]) <= SMALL_ROW}
    for loop in bundle.schedule:
        if isinstance(loop, Loop) and loop.eqn.primitive.name == "scan" and J.as_scan(loop.eqn).length:
            weights = {v: w for w, v in enumerate(bundle.families[loop.family].weights)}
            scanned = [weights[a] for a in J.as_scan(loop.eqn).xs if not isinstance(a, J.Literal) and a in weights]
            found |= {bundle.stored[loop.family, w] for w in scanned}
    return found
