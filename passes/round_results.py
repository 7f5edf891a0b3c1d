"""Round results to TF32 where they are written, for kernels that would cut off what TF32 has no place for.

Before                                            After
    pack 0 x2 conv 1x1 ...: indexed_gemm              pack 0 x2 conv 1x1 ...: indexed_gemm
      f0: %3:f32[..] = conv_general_dilated %2 %0       f0: %3:f32[..] = conv_general_dilated %2 %0
      then f0: %4:f32[..] = max %3 0                    then f0: %4:f32[..] = max %3 0
    pack 1 x2 conv 3x3 ...: mosaic_gemm                 then rounded to TF32
      f0: %5:f32[..] = conv_general_dilated %4 %1     pack 1 x2 conv 3x3 ...: mosaic_gemm
                                                        f0: %5:f32[..] = conv_general_dilated %4 %1

mosaic_gemm in float32 reads operands that were rounded (coalesce/tf32.py): weights when they are written into the bank,
what is computed where it is written, in the kernel whose epilogue it is, or attention's. That is done only where all
who read a result multiply it in TF32, perhaps after a maximum over windows or another shape, and so would round it
anyway: no other value of the program changes. Where an operand cannot come rounded, XLA rounds it before, or another
kernel runs the pack if that is cheaper. Relies on: kernels are chosen, and epilogues are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from coalesce import jaxpr as J
from coalesce.bundle import Attention, Bundle, equations, Item, JointStep, Pack, packs, problems, Step
from coalesce.costs import Costs
from coalesce.epilogues import epilogue_reads, result_of
from coalesce.kernels import choose, FUSING
from coalesce.passes.choose_kernels import Choice
from coalesce.reschedule import map_schedule
from coalesce.tf32 import by_element, multiplies
from coalesce.tuning import Tuned, UNTUNED

CUTS, INSTEAD = "mosaic_gemm", "indexed_gemm"
ELEMENTWISE = frozenset({"batched_matvec", "conv_taps", "indexed_matvec"})
# What chooses among numbers or moves them, so that they may be rounded before it as well as after.
CHOOSES = frozenset({"reduce_window_max", "reduce_max", "reshape", "rev", "slice", "squeeze", "transpose"})

Name = tuple[int, Any]  # (family, variable)


def round_results(bundle: Bundle, *, costs: Costs, tuned: Tuned = UNTUNED, choice: Choice = choose) -> Bundle:
    """`choice` as in choose_kernels: a kernel that the caller has named stays."""
    if not any(map(cuts, packs(bundle.schedule))):
        return bundle
    rounding, rounded = found(bundle)

    def instead(item: Pack | JointStep) -> Item:
        if isinstance(item, JointStep) or choice is not choose or not cuts(item):
            return item
        return otherwise(item, bundle, costs, tuned)

    def own(at: int, item: Item) -> Item:
        if at not in rounded:
            (item,) = map_schedule((item,), instead)
        rounds, comes = at in rounding, at in rounded
        if isinstance(item, Attention):
            return item if rounds == item.rounds else replace(item, rounds=rounds)
        if not isinstance(item, Pack):
            return item
        return item if (rounds, comes) == (item.rounds, item.rounded) else replace(item, rounds=rounds, rounded=comes)

    schedule = tuple(own(at, item) for at, item in enumerate(bundle.schedule))
    same = all(a is b for a, b in zip(schedule, bundle.schedule, strict=True))
    return bundle if same else replace(bundle, schedule=schedule)


def cuts(pack: Pack) -> bool:
    return pack.kernel == CUTS and multiplies(pack.op)


def rounds(pack: Pack) -> bool:
    """Whether a pack's kernel multiplies its operand in TF32: not if it does so element by element."""
    by_xla = pack.kernel not in FUSING and not by_element(pack.op)
    return multiplies(pack.op) and pack.kernel not in ELEMENTWISE and (pack.kernel in FUSING or by_xla)


def found(bundle: Bundle) -> tuple[set[int], set[int]]:
    """Places of packs that round their results, and of those whose left operands come rounded."""
    readers, kept = readers_of(bundle), results_of(bundle)
    rounding: set[int] = set()
    rounded: set[int] = set()
    for at, item in enumerate(bundle.schedule):
        name = written_by(item)
        if name is None or str(J.dtype(name[1])) != "float32":
            continue
        who = {end for end in multiplied(name, readers, kept) or () if cuts(pack_at(bundle, end))}
        if who:
            rounding.add(at)
            rounded |= who
    return rounding, rounded


def written_by(item: Item) -> Name | None:
    """The one value that a kernel of ours leaves, which it can round."""
    if isinstance(item, Attention):
        end = (*item.values.members, *item.after)[-1]
        return end.family, end.eqn.outvars[0]
    if not isinstance(item, Pack) or item.kernel not in FUSING or item.form or len(item.members) != 1:
        return None
    last = result_of(item)
    return None if last is None else (item.members[0].family, last)


def pack_at(bundle: Bundle, at: int) -> Pack:
    item = bundle.schedule[at]
    assert isinstance(item, Pack), f"a product that is no pack: {item}"
    return item


def results_of(bundle: Bundle) -> set[Name]:
    both = ((f, a) for f, family in enumerate(bundle.families) for a in J.outvars(family.jaxpr))
    return {(f, a) for f, a in both if not isinstance(a, J.Literal)}


Reader = tuple[int, Step | None]  # its place; the step that chooses among the numbers; None: who multiplies them


def readers_of(bundle: Bundle) -> Mapping[Name, list[Reader | None]]:
    """Of each value; None for whoever reads it in another way."""
    readers: dict[Name, list[Reader | None]] = {}

    def note(f: int, atom: Any, reader: Reader | None) -> None:
        if not isinstance(atom, J.Literal):
            readers.setdefault((f, atom), []).append(reader)

    for at, item in enumerate(bundle.schedule):
        match item:
            case Pack():
                would = len(item.members) == 1 and not item.form and rounds(item)
                for m in item.members:
                    note(m.family, m.eqn.invars[0], (at, None) if would else None)
                    note(m.family, m.eqn.invars[1], None)
                for atom in epilogue_reads(item):
                    note(item.members[0].family, atom, None)
            case Step(family, _, eqn) if eqn.primitive.name in CHOOSES:
                for atom in eqn.invars:
                    note(family, atom, (at, item))
            case _:
                for f, eqn in equations(item):
                    for atom in eqn.invars:
                        note(f, atom, None)
    return readers


def multiplied(name: Name, readers: Mapping[Name, list[Reader | None]], kept: set[Name]) -> list[int] | None:
    """The places of the packs that multiply a value in TF32; None if it is read in any other way."""
    found: list[int] = []
    if name in kept:
        return None
    for reader in readers.get(name, ()):
        if reader is None:
            return None
        at, step = reader
        ends = [at] if step is None else multiplied((name[0], step.eqn.outvars[0]), readers, kept)
        if ends is None:
            return None
        found += ends
    return found


def otherwise(pack: Pack, bundle: Bundle, costs: Costs, tuned: Tuned) -> Pack:
    """Another kernel, unless the one it has wins more than it costs to round its operand before it."""
    groups, rows = problems(pack, bundle.families)
    times, lhs = tuned.rivals(pack.op, groups, rows, (CUTS, INSTEAD)), pack.op.lhs
    if times is not None:
        here, there = times
        nbytes = groups * rows * lhs.size * lhs.dtype.itemsize
        if here + costs.light(nbytes, nbytes) < there:
            return pack
    return replace(pack, kernel=INSTEAD, blocks=tuned.blocks(pack.op, groups, rows, INSTEAD))
