"""A schema: where the weights lie of all tenants that run the same programs, the same for every width and shape.

The layouts are those that the kernels of REFERENCE lanes want, in the largest request shape; at other widths, and in
other request shapes, kernels are chosen among those that read them: few read for many rows what one row wants. What
each tenant has its own lies in a row of a slab [slots, size], as few slabs as can be: kernels that read by slot read it
there, and for others what they read is gathered anyway. What tenants share is an array of one row. Programs may be cut
into segments, all of which read the one bank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from coalesce.bundle import Array, Bundle
from coalesce.costs import Costs
from coalesce.heavy import HeavyOp
from coalesce.kernels import choose
from coalesce.layout import Layout
from coalesce.passes.bundle_pipeline import BundleStep, run_passes, serving_passes
from coalesce.passes.form_packs import form_packs
from coalesce.passes.join_arrays import side_by_side
from coalesce.passes.keep_layouts import Held, read_in_full
from coalesce.passes.segment import segment
from coalesce.serving.as_it_is import arrays_of
from coalesce.serving.fit import Fit, Template, widened
from coalesce.serving.segments import Segments, segments_of
from coalesce.slab import Slab
from coalesce.tuning import Tuned, UNTUNED

REFERENCE = 8  # lanes
LONGEST = 64 * 2**20  # bytes of a slab's row: with 64 tenants it can still be addressed with 32 bits


@dataclass(frozen=True)
class Options:
    """How programs are planned: see `coalesce.fuse`."""

    platform: str
    costs: Costs
    choice: Callable[[HeavyOp, int, str], str] = choose
    tuned: Tuned = UNTUNED
    pack_unbounded_loops: bool = False
    as_it_is: bool = False  # one lane at a time, and nothing rewritten
    left: bool = False  # programs leave their results on the host: see `Returned`
    captured: bool = False  # what reads the bank may be a CUDA graph: see coalesce/serving/captured.py


class Place(NamedTuple):
    """Where a weight lies in its layout: in which argument, and from where in its rows on."""

    argument: int
    start: int


@dataclass(frozen=True, eq=False)
class Schema:
    key: Hashable
    templates: tuple[Template, ...]
    segments: tuple[Segments, ...]  # of each template
    own: tuple[bool, ...]  # of each weight, whether each tenant has its own
    options: Options
    arrays: tuple[Array, ...] = ()  # rows ((0, weight),): every weight in every layout that is read
    slabs: tuple[Slab, ...] = ()  # every array is in one
    places: dict[tuple[int, Layout], Place] = field(default_factory=dict)

    @property
    def bank(self) -> Schema:
        """What of it says where weights lie. Executables are made of that and of their own programs."""
        return replace(self, key=None, templates=(), segments=())

    def owned(self, argument: int) -> bool:
        """Whether an argument has a row for each slot, rather than one that all share."""
        return self.own[self.arrays[self.slabs[argument].arrays[0]].rows[0][1]]

    def structs(self, capacity: int) -> list[jax.ShapeDtypeStruct]:
        """The bank for so many slots."""
        firsts = [self.arrays[slab.arrays[0]] for slab in self.slabs]
        return [
            jax.ShapeDtypeStruct((capacity, slab.size) if self.owned(i) else (1, *first.shape), first.dtype)
            for i, (slab, first) in enumerate(zip(self.slabs, firsts, strict=True))
        ]

    @property
    def slot_bytes(self) -> int:
        """What one more slot takes."""
        return sum(nbytes(s) for i, s in enumerate(self.structs(1)) if self.owned(i))

    @property
    def shared_bytes(self) -> int:
        return sum(nbytes(s) for i, s in enumerate(self.structs(1)) if not self.owned(i))


def call_here(function: Callable[..., Any], *given: Any, known: Sequence[object] = ()) -> Any:
    return function(*given)


def plan_schema(
    fit: Fit,
    options: Options,
    segments: int | None = 1,
    patience_us: float | None = None,
    call: Callable[..., Any] = call_here,
) -> Schema:
    """The schema of all tenants that fit like this one; `segments` and `patience_us` as in `segment`. `call` may plan
    in another process, and gives back the objects of `known` as they are."""
    given = fit.templates, fit.own, options, segments, patience_us
    return replace(call(planned, *given, known=(options, *fit.templates)), key=fit.key)


def planned(
    templates: tuple[Template, ...],
    own: tuple[bool, ...],
    options: Options,
    segments: int | None,
    patience_us: float | None,
) -> Schema:
    """Without a key, which is about the process that it is for."""
    cuts = tuple(cut(template, options, segments, patience_us) for template in templates)
    schema = Schema(None, templates, cuts, own, options)
    arrays: dict[tuple[int, Layout], Array] = {}
    every = [template for whole in cuts for template in whole.templates]
    full = in_full(every, own) if len(every) > 1 and not options.as_it_is else set()
    for template in sorted(every, key=lambda own: -sum(x.size for x in own.inputs)):
        for width in (REFERENCE, 1):  # one lane walks into what several run lane by lane
            held: dict[int, list[Layout]] = {}
            for weight, layout in arrays:
                held.setdefault(weight, []).append(layout)
            for array in plan_lanes([(schema, template, width)], [held], [full])[-1].bundle.arrays:
                weight, layout = weight_of(array)
                arrays.setdefault((weight, layout), Array(((0, weight),), array.shape, array.dtype, (layout,)))
    slabs = laid_out(list(arrays.values()), own)
    places = {
        weight_of(array): Place(i, slab.starts[slab.arrays.index(a)])
        for i, slab in enumerate(slabs)
        for a, array in enumerate(arrays.values())
        if a in slab.arrays
    }
    return Schema(None, templates, cuts, own, options, tuple(arrays.values()), slabs, places)


def cut(
    template: Template, options: Options, segments: int | None, patience_us: float | None, slower: float = 1.0
) -> Segments:
    found = segment(
        template.family.jaxpr,
        template.family.n_weights,
        costs=options.costs,
        segments=segments,
        patience_us=patience_us,
        slower=slower,
    )
    return segments_of(template, found)


def in_full(templates: Sequence[Template], own: Sequence[bool]) -> set[int]:
    """The weights that any of them reads in full, see `read_in_full`."""
    bundles = [form_packs(Bundle(("0",), (widened(template, own, 1, 0),))) for template in templates]
    return {weight for bundle in bundles for _, weight in read_in_full(bundle)}


def plan_lanes(
    entries: Sequence[tuple[Schema, Template, int]], held: Sequence[Held], full: Sequence[Collection[int]] = ()
) -> tuple[BundleStep, ...]:
    """The program of some lanes of each entry; lane i of entry e is a tenant, and the entries before it come first.
    `full` as in `keep_layouts`, where a weight is not held yet."""
    firsts = np.cumsum([0, *(width for _, _, width in entries)])
    families = tuple(
        widened(template, schema.own, width, int(first))
        for (schema, template, width), first in zip(entries, firsts, strict=False)
    )
    options = entries[0][0].options
    names = tuple(f"{e}.{i}" for e, (_, _, width) in enumerate(entries) for i in range(width))
    if options.as_it_is:
        ((_, template, _),) = entries
        return (BundleStep("as_it_is", Bundle(names, families, arrays=arrays_of(template)), 0.0),)
    passes = serving_passes(
        held=held,
        platform=options.platform,
        costs=options.costs,
        choice=options.choice,
        tuned=options.tuned,
        pack_unbounded_loops=options.pack_unbounded_loops,
        full=full,
    )
    return run_passes(Bundle(names, families), passes)


def weight_of(array: Array) -> tuple[int, Layout]:
    """Of an array whose rows are one weight of each lane: which, and its layout."""
    (weight,), (layout,) = {w for _, w in array.rows}, set(array.layouts)
    return weight, layout


def laid_out(arrays: Sequence[Array], own: Sequence[bool]) -> tuple[Slab, ...]:
    """A slab for each dtype of what is each tenant's own, more if rows get long; one for each array that is shared."""
    groups: dict[Any, list[int]] = {}
    for i, array in enumerate(arrays):
        groups.setdefault(array.dtype if own[array.rows[0][1]] else i, []).append(i)
    slabs: list[Slab] = []
    for group in groups.values():
        slabs += side_by_side(arrays, group, LONGEST // np.dtype(arrays[group[0]].dtype).itemsize)
    return tuple(slabs)


def nbytes(struct: jax.ShapeDtypeStruct) -> int:
    return struct.size * struct.dtype.itemsize
