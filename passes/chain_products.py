"""Run products that follow one another in one kernel, where that was measured to win: what one computes the next one
reads tile by tile, before or instead of writing it.

Before                                            After
    pack 3 x2 dot ...: indexed_gemm                   pack 3 x2 dot ...: indexed_gemm in launch 3
      f0: %8:bf16[..] = dot_general %7 %3               f0: %8:bf16[..] = dot_general %7 %3
      then f0: %9:bf16[..] = add %8 %1                  then f0: %9:bf16[..] = add %8 %1
    f0: %10:bf16[..] = slice %9                       pack 4 x2 dot ...: indexed_gemm chained in launch 3
    pack 4 x2 dot ...: indexed_gemm                     f0: %11:bf16[..] = dot_general %9 %4
      f0: %11:bf16[..] = dot_general %9 %4            f0: %10:bf16[..] = slice %9

A wide product runs with the one that multiplies its result, with one whose result its epilogue alone reads (as a
shortcut's), and with one whose result it alone multiplies: of a ResNet all that lies between two residuals (see
coalesce/kernels/chained.py). Which of them, the tuning database says: what was not measured is not chained, nor what
was and did not win. Relies on: kernels are chosen, and epilogues are theirs. Gives: packs of a chain stand where its
wide product stood, each behind what it reads; nothing else moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from coalesce import jaxpr as J
from coalesce.blocks import Blocks
from coalesce.bundle import Bundle, folds_of, Item, Pack, problems
from coalesce.epilogues import epilogue_reads, result_of
from coalesce.kernels import chained
from coalesce.kernels.strips import edges
from coalesce.passes.scopes import left_by, makers_and_readers
from coalesce.passes.share_launches import numbered
from coalesce.tuning import Tuned, UNTUNED
from coalesce.tuning.chains import Chain

KERNELS = ("indexed_gemm", "mosaic_gemm")  # that read the weights as the chained kernel does


class Found(NamedTuple):
    """Packs that may run in one launch, by their places."""

    feed: int | None
    head: int | None
    wide: int
    narrow: int | None

    @property
    def places(self) -> list[int]:
        return [at for at in self if at is not None]


def chain_products(bundle: Bundle, *, tuned: Tuned = UNTUNED) -> Bundle:
    scope = Scope(bundle)
    gains = [(won[1], found, won[0]) for found in scope.chains() if (won := tuned.chain(*scope.size(found)))]
    chosen: dict[int, tuple[Found, Blocks]] = {}
    for _, found, blocks in sorted(gains, key=lambda one: (-one[0], one[1].wide)):
        if not any(at in chosen for at in found.places):
            chosen.update(dict.fromkeys(found.places, (found, blocks)))
    if not chosen:
        return bundle
    out: list[Item] = []
    for at, item in enumerate(bundle.schedule):
        if at not in chosen:
            out.append(item)
        elif at == chosen[at][0].wide:
            out += scope.launch(*chosen[at])
    return replace(bundle, schedule=numbered(tuple(out)))


class Scope:
    """The schedule of a bundle: which packs can be chained, where each value is made, and who reads it."""

    def __init__(self, bundle: Bundle) -> None:
        self.families = bundle.families
        self.packs = {at: item for at, item in enumerate(bundle.schedule) if isinstance(item, Pack) and can_chain(item)}
        self.left = left_by(bundle)
        self.made, readers = makers_and_readers(bundle.schedule)
        self.readers = {name: set(places) for name, places in readers.items()}

    def chains(self) -> Iterator[Found]:
        """Each that could run: of every wide product the longest, and its parts."""
        for at in self.packs:
            feeds, heads, narrows = ((part(at), None) for part in (self.feed, self.head, self.narrow))
            each = {Found(feed, head, at, narrow): None for feed, head, narrow in product(feeds, heads, narrows)}
            yield from (found for found in each if len(found.places) > 1 and self.fits(found))

    def feed(self, at: int) -> int | None:
        """The product whose result is there for the epilogue of the one at a place alone."""
        pack = self.packs[at]
        for atom in epilogue_reads(pack):
            before = self.maker(pack, atom)
            alone = before is not None and not self.readers_but(before, at)
            if alone and atom not in pack.members[0].eqn.invars and self.fits(Found(before, None, at, None)):
                return before
        return None

    def head(self, at: int) -> int | None:
        """The product whose result is there for the one at a place alone to multiply."""
        pack = self.packs[at]
        atom = pack.members[0].eqn.invars[0]
        before = self.maker(pack, atom)
        alone = before is not None and not self.readers_but(before, at)
        return before if alone and atom not in epilogue_reads(pack) else None

    def narrow(self, at: int) -> int | None:
        """The product that multiplies the result of the one at a place, and else reads what was there before."""
        pack = self.packs[at]
        f, result = pack.members[0].family, result_of(pack)
        for after in sorted(self.readers.get((f, result), ())):
            other = self.packs.get(after)
            if other is None or other.members[0].eqn.invars[0] is not result:
                continue
            there = all(self.made.get((f, atom), -1) < at for atom in epilogue_reads(other))
            if there and self.fits(Found(None, None, at, after)):
                return after
        return None

    def maker(self, pack: Pack, atom: J.Atom) -> int | None:
        """The product of which a value is the result."""
        before = self.made.get((pack.members[0].family, atom))
        return before if before in self.packs and atom is result_of(self.packs[before]) else None

    def readers_but(self, at: int, reader: int) -> set[int]:
        """Who else reads a pack's result; -1 is whoever called the program."""
        pack = self.packs[at]
        name = pack.members[0].family, result_of(pack)
        return (self.readers.get(name, set()) | ({-1} if name in self.left else set())) - {reader}

    def fits(self, found: Found) -> bool:
        """Whether lanes lie alike in all of them, and the kernel can run them."""
        packs = [self.packs[at] for at in found.places]
        folds = [folds_of(pack, self.families) for pack in packs]
        if any(fold != folds[0] for fold in folds) or any(pack.op.context != packs[0].op.context for pack in packs):
            return False
        return chained.supports(*self.chain(found))

    def chain(self, found: Found) -> Chain:
        feed, head, wide, narrow = (None if at is None else self.packs[at].op for at in found)
        assert wide is not None, "a chain without its middle"
        return Chain(feed, head, wide, narrow)

    def size(self, found: Found) -> tuple[Chain, int, int]:
        return self.chain(found), *problems(self.packs[found.wide], self.families)

    def launch(self, found: Found, blocks: Blocks) -> list[Pack]:
        inner = {found.feed, found.head}
        if found.narrow is not None and not self.readers_but(found.wide, found.narrow):
            inner.add(found.wide)
        first = self.packs[found.places[0]].index
        how = {"kernel": chained.KERNEL, "blocks": blocks, "launch": first}
        reads = {found.wide: len(found.places) > 1 + (found.narrow is not None), found.narrow: True}
        return [replace(self.packs[at], **how, chained=reads.get(at, False), inner=at in inner) for at in found.places]


def can_chain(pack: Pack) -> bool:
    """A pack of one family that is in no launch, whose lanes have weights and results of their own, all columns of one
    result."""
    if pack.kernel not in KERNELS or pack.form or len(pack.members) != 1 or pack.launch is not None:
        return False
    if result_of(pack) is None or any(edges(step.eqn) is not None for step in pack.epilogue):
        return False
    return pack.members[0].varies and pack.members[0].weight is not None
