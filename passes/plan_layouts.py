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
from coalesce.bundle import Array, Bundle, Loop, map_packs, Pack, packs, Schedule
from coalesce.family import Family
from coalesce.kernels import KERNELS
from coalesce.layout import AS_IS, Layout


def plan_layouts(bundle: Bundle) -> Bundle:
    arrays: dict[Array, int] = {}
    stored: dict[tuple[int, int], int] = {}
    for f, family in enumerate(bundle.families):
        for w in sorted(light_reads(bundle, f, family)):
            array = Array(*rows_of(family, w, AS_IS))
            stored[f, w] = arrays.setdefault(array, len(arrays))
    new: dict[int, Pack] = {}
    for item in packs(bundle.schedule):
        layout = KERNELS[item.kernel].layout(item.members[0].op)
        parts = [rows_of(bundle.families[m.family], m.weight, layout) for m in item.members if m.weight is not None]
        if not parts:
            new[item.index] = item
            continue
        array = Array(tuple(row for part in parts for row in part[0]), *parts[0][1:])
        index = arrays.setdefault(array, len(arrays))
        new[item.index] = item if index == item.array else replace(item, array=index)
    same = all(new[item.index] is item for item in packs(bundle.schedule))
    if same and tuple(arrays) == bundle.arrays and stored == bundle.stored:
        return bundle
    return replace(bundle, schedule=map_packs(bundle.schedule, new), arrays=tuple(arrays), stored=stored)


def rows_of(
    family: Family, weight: int, layout: Layout
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...], str, Layout]:
    """The fields of the Array that holds one weight of a family."""
    aval = J.aval_struct(family.weights[weight].aval)
    return family.owners[weight], layout.of(aval.shape), str(aval.dtype), layout


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
        elif item.family != family:
            continue
        elif isinstance(item, Loop):
            atoms = [item.eqn.invars[0]] if item.eqn.primitive.name == "cond" else []
            operands = J.region_operands(item.eqn)
            for body, region, (given, fixed) in zip(item.bodies, J.regions(item.eqn), operands, strict=True):
                inside = read_by(body, family, J.outvars(region))
                atoms += [a for a, arg in zip(given[:fixed], J.invars(region), strict=False) if arg in inside]
                atoms += given[fixed:]
        else:
            atoms = item.eqn.invars
        read.update(a for a in atoms if not isinstance(a, J.Literal))
    return read
