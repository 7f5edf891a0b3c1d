"""Which equations `hoist_weights` may move: the one rule, for whole programs and for the bodies of loops."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.behaviour import may_move, may_speculate
from coalesce.heavy import HEAVY


@dataclass(frozen=True)
class Moved:
    """The answer: `eqns` move; `copied` are constants and broadcasts that moved equations read and that stay too."""

    eqns: frozenset[int]  # id(eqn)
    copied: frozenset[int]
    results: frozenset[Any]  # variables that moved equations bind

    def dead(self, stay: Sequence[J.Eqn], outs: Sequence[J.Atom]) -> set[int]:
        """Copied equations that nothing reads any more where they stand."""
        read = {a for eqn in stay if id(eqn) not in self.copied for a in eqn.invars if not isinstance(a, J.Literal)}
        read |= {a for a in outs if not isinstance(a, J.Literal)}
        dead: set[int] = set()
        for eqn in reversed(stay):
            if id(eqn) not in self.copied:
                continue
            if read.isdisjoint(eqn.outvars):
                dead.add(id(eqn))
            else:
                read |= {a for a in eqn.invars if not isinstance(a, J.Literal)}
        return dead


def movable(jaxpr: ClosedJaxpr, weights: Sequence[J.Var], speculative: bool = False) -> Moved:
    """Equations of `jaxpr` to compute ahead, given the arguments that are weights.

    `speculative`: they would run where their own program might not have run them, as the work of an untaken branch.
    """
    sources = {v: 1 << i for i, v in enumerate(weights)}  # the weights that a value reads, as bits; 0 for constants
    size = [J.nbytes(v.aval) for v in weights]
    ahead: set[int] = set()  # what could be computed ahead, constants included
    candidates: list[J.Eqn] = []
    for eqn in jaxpr.jaxpr.eqns:
        reads = source_bits(eqn, sources)
        if reads is None or (speculative and not may_speculate(eqn)):
            continue
        sources.update((v, reads) for v in eqn.outvars if not J.is_drop(v))
        ahead.add(id(eqn))
        if reads:
            candidates.append(eqn)
    consumers = consumers_of(jaxpr)
    moved: set[int] = set()
    for eqn in reversed(candidates):
        frontier = [v for v in eqn.outvars if any(id(use) not in moved for use in consumers[v])]
        if not frontier:
            if any(consumers[v] for v in eqn.outvars):  # everything that reads it moves
                moved.add(id(eqn))
            continue
        read = sum(size[i] for i in bits(sources[outs(eqn)[0]]))
        grows = sum(J.nbytes(v.aval) for v in frontier) > read
        if not grows or any(feeds_heavy(v, consumers[v]) for v in frontier):
            moved.add(id(eqn))
    copied: set[int] = set()
    needed: set[Any] = set()
    for eqn in reversed(jaxpr.jaxpr.eqns):
        if id(eqn) in moved or (id(eqn) in ahead and not needed.isdisjoint(eqn.outvars)):
            needed.update(a for a in eqn.invars if not isinstance(a, J.Literal))
            if id(eqn) not in moved:
                copied.add(id(eqn))
    results = frozenset(v for eqn in candidates if id(eqn) in moved for v in outs(eqn))
    return Moved(frozenset(moved), frozenset(copied), results)


def outs(eqn: J.Eqn) -> list[J.Var]:
    return [v for v in eqn.outvars if not J.is_drop(v)]


def bits(mask: int) -> list[int]:
    """The positions of the set bits."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def source_bits(eqn: J.Eqn, sources: dict[Any, int]) -> int | None:
    """The weights that an equation's results read; None if they read anything else or must stay."""
    atoms = [a for a in eqn.invars if not isinstance(a, J.Literal)]
    if not outs(eqn) or any(a not in sources for a in atoms) or not may_move(eqn):
        return None
    mask = 0
    for a in atoms:
        mask |= sources[a]
    return mask


class Output:
    """Stands for the program's outputs among the consumers of a variable."""


def consumers_of(jaxpr: ClosedJaxpr) -> defaultdict[Any, list[Any]]:
    uses: defaultdict[Any, list[Any]] = defaultdict(list)
    for eqn in jaxpr.jaxpr.eqns:
        for a in eqn.invars:
            if not isinstance(a, J.Literal):
                uses[a].append(eqn)
    for a in J.outvars(jaxpr):
        if not isinstance(a, J.Literal):
            uses[a].append(Output)
    return uses


def feeds_heavy(var: J.Var, uses: Sequence[Any]) -> bool:
    """Whether a heavy op reads the value, as it is or as an argument of a loop's body or a branch."""
    for eqn in uses:
        if eqn is Output:
            continue
        if eqn.primitive.name in HEAVY:
            return True
        for arg, region in J.region_args(eqn, var):
            if feeds_heavy(arg, consumers_of(region)[arg]):
                return True
    return False
