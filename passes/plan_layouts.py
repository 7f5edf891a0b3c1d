"""Say where every weight lies: one stacked array a weight of a family, or a weight of a pack, in its reader's layout.

Before                                        After
    pack 0 x16 conv 3x3 ...: conv_slices          pack 0 x16 conv 3x3 ...: conv_slices on array 0
                                                  array 0: 16 rows of f32[576,64]

A weight that heavy ops alone read lies in the layout of their kernel. A weight that anything else reads, such as a tied
embedding, lies as it is for that reader, and once more for a kernel that wants another layout or another company. Rows
follow `family.rows`: lanes that share a weight share its row. Gives: every pack with a weight operand has its array,
and `bundle.stored` finds every other weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from coalesce import jaxpr as J
from coalesce.bundle import (
    Array,
    Attention,
    Bundle,
    equations,
    Item,
    JointLoop,
    JointStep,
    Loop,
    Pack,
    Rowwise,
    Schedule,
    STACKED,
)
from coalesce.epilogues import epilogue_reads
from coalesce.family import Family
from coalesce.kernels import as_product, KERNELS
from coalesce.layout import AS_IS, Layout
from coalesce.member import Member
from coalesce.reschedule import map_schedule
from coalesce.unify import largest


def plan_layouts(bundle: Bundle) -> Bundle:
    arrays: dict[Array, int] = {}
    stored: dict[tuple[int, int], int] = {}
    for f, family in enumerate(bundle.families):
        for w in sorted(light_reads(bundle, f, family)):
            stored[f, w] = arrays.setdefault(array_of(bundle, [(f, w, AS_IS)]), len(arrays))

    def laid_out(item: Pack | JointStep) -> Item:
        if isinstance(item, JointStep):
            return with_arrays(bundle, item, arrays)
        readers = [(m.family, m.weight, row_layout(item, m)) for m in item.members if m.weight is not None]
        if not readers:
            return item
        array = array_of(bundle, readers)
        index = arrays.setdefault(each_once(array) if item.form in STACKED else array, len(arrays))
        return item if index == item.array else replace(item, array=index)

    schedule = map_schedule(bundle.schedule, laid_out)
    if schedule is bundle.schedule and tuple(arrays) == bundle.arrays and stored == bundle.stored:
        return bundle
    return replace(bundle, schedule=schedule, arrays=tuple(arrays), stored=stored)


def each_once(array: Array) -> Array:
    """The array with one row for each weight, as `stacked_fold` counts them."""
    layouts = dict(zip(reversed(array.rows), reversed(array.layouts), strict=True))
    rows = tuple(dict.fromkeys(array.rows))
    return replace(array, rows=rows, layouts=tuple(layouts[row] for row in rows))


def row_layout(pack: Pack, member: Member) -> Layout:
    """How a member's weight becomes a row that the pack's kernel reads: padded to the pack's shape first."""
    own = AS_IS
    if pack.form == "product":
        own = as_product.layout(member.op)
    if own.of(member.op.rhs.shape) != pack.op.rhs.shape:
        own = own.pad(pack.op.rhs.shape)
    read = KERNELS[pack.kernel].layout(pack.op)
    return own.then(read.rounded() if pack.weight_rounded else read)


def with_arrays(bundle: Bundle, step: JointStep, arrays: dict[Array, int]) -> JointStep:
    """The step with the arrays of operands that are weights, padded to one shape."""
    found: list[int | None] = []
    for k, column in enumerate(zip(*(part.weights for part in step.parts), strict=True)):
        if None in column:
            found.append(None)
            continue
        shapes = [J.shape(part.eqn.invars[k]) for part in step.parts]
        padded = largest(shapes)
        layouts = [AS_IS if shape == padded else AS_IS.pad(padded) for shape in shapes]
        readers = [(p.family, w, at) for p, w, at in zip(step.parts, column, layouts, strict=True) if w is not None]
        found.append(arrays.setdefault(array_of(bundle, readers), len(arrays)))
    return step if tuple(found) == step.arrays else replace(step, arrays=tuple(found))


def array_of(bundle: Bundle, readers: Sequence[tuple[int, int, Layout]]) -> Array:
    """The array of weights that are read as one: (family, weight, layout) of each."""
    rows, layouts = [], []
    for f, w, layout in readers:
        owners = bundle.families[f].owners[w]
        rows += owners
        layouts += [layout] * len(owners)
    f, w, layout = readers[0]
    aval = J.aval_struct(bundle.families[f].weights[w].aval)
    return Array(tuple(rows), layout.of(aval.shape), str(aval.dtype), tuple(layouts))


def light_reads(bundle: Bundle, index: int, family: Family) -> set[int]:
    """The weights of a family that something other than the right operand of a pack reads."""
    read = read_by(bundle.schedule, index, J.outvars(family.jaxpr))
    return {w for w, var in enumerate(family.weights) if var in read}


def read_by(schedule: Schedule, family: int, outs: Sequence[J.Atom]) -> set[Any]:
    """The variables of a scope that its items or results read as values, rather than from a pack's array."""
    read: set[Any] = {a for a in outs if not isinstance(a, J.Literal)}
    for item in schedule:
        if isinstance(item, Pack):
            members = [m for m in item.members if m.family == family]
            atoms = [a for m in members for a in (m.eqn.invars if m.weight is None else m.eqn.invars[:1])]
            atoms += epilogue_reads(item) if members else []
        elif isinstance(item, JointStep):
            packed = [
                k for k, column in enumerate(zip(*(p.weights for p in item.parts), strict=True)) if None not in column
            ]
            parts = [part for part in item.parts if part.family == family]
            atoms = [a for part in parts for k, a in enumerate(part.eqn.invars) if k not in packed]
        elif isinstance(item, JointLoop):
            parts = [part for part in item.parts if part.family == family]
            atoms = [a for part in parts for a in region_reads(part.eqn, (item.body,), family)]
        elif isinstance(item, Attention | Rowwise):
            atoms = [a for f, eqn in equations(item) if f == family for a in eqn.invars]
        elif item.family != family:
            continue
        elif isinstance(item, Loop):
            atoms = region_reads(item.eqn, item.bodies, family)
        else:
            atoms = item.eqn.invars
        read.update(a for a in atoms if not isinstance(a, J.Literal))
    return read


def region_reads(eqn: J.Eqn, bodies: Sequence[Schedule], family: int) -> list[J.Atom]:
    """What a control-flow equation reads as values."""
    atoms = [eqn.invars[0]] if eqn.primitive.name == "cond" else []
    for body, region, (given, fixed) in zip(bodies, J.regions(eqn), J.region_operands(eqn), strict=True):
        inside = read_by(body, family, J.outvars(region))
        atoms += [a for a, arg in zip(given[:fixed], J.invars(region), strict=False) if arg in inside]
        atoms += given[fixed:]
    return atoms
