"""Cut a program into segments: the parts of it that a scheduler may run one by one, with others in between.

Before                                            After, with segments=2
    a(%0:f32[8,8], %1:f32[8,8] | %2:f32[2,8])         segment 0(%0:f32[8,8] | %1:f32[2,8])
      %3:f32[2,8] = dot_general %2 %0                   %2:f32[2,8] = dot_general %1 %0
      %4:f32[2,8] = tanh %3                             %3:f32[2,8] = tanh %2
      %5:f32[2,8] = dot_general %4 %1                   -> %3
      %6:f32[2,8] = tanh %5                             live %3 in register 0
      -> %6                                           segment 1(%4:f32[8,8] | %3:f32[2,8])
                                                        %5:f32[2,8] = dot_general %3 %4
                                                        %6:f32[2,8] = tanh %5
                                                        -> %6

What is live at a cut waits in registers, each for one value of every lane under way, but for what was spread to a
larger value: who reads that spreads it again. Values that are never live at the same time share a register, but no
segment writes one that it reads, so that it can be run again. Cuts lie where live sets are small and times balanced
(`passes/cuts.py`), also between steps of a scan (`passes/split_scans.py`). What depends on weights and literals alone
is not kept: each segment that reads it computes it. A program with a callback on the host is not cut, since a segment
that raises would take the registers of other lanes with it; nor is one with a while_loop, which might not end in a lane
that nobody uses. Relies on: `hoist_weights` has left nothing of weight alone that is dear. Gives: run one after the
other, the segments compute what the program does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.behaviour import CALLBACKS, may_speculate
from coalesce.costs import Costs
from coalesce.costs.program import equation_us, equations_us
from coalesce.heavy import HEAVY
from coalesce.passes.cuts import choose_cuts, Demand, Point
from coalesce.passes.live import lifetimes, live_before
from coalesce.passes.split_scans import split_scans
from coalesce.text import body_lines, Names


@dataclass(frozen=True, eq=False)
class Segment:
    """`jaxpr` is (weights..., inputs...) -> outputs. The inputs of the first are the program's own, the outputs of the
    last its results; all others lie in registers."""

    jaxpr: ClosedJaxpr
    weights: tuple[int, ...]  # of the program, for each of its own
    reads: tuple[int, ...]  # the registers of its inputs; none of the first
    writes: tuple[int, ...]  # the registers of its outputs; none of the last


@dataclass(frozen=True, eq=False)
class Segmented:
    segments: tuple[Segment, ...]
    registers: tuple[jax.ShapeDtypeStruct, ...] = ()  # of one lane
    why: str = ""  # there are so many
    predicted_us: tuple[float, ...] = ()  # of each, with one lane

    def __str__(self) -> str:
        return "\n".join(lines_of(self))


def segment(
    program: ClosedJaxpr,
    n_weights: int,
    *,
    costs: Costs,
    segments: int | None = None,
    patience_us: float | None = None,
    slower: float = 1.0,
) -> Segmented:
    """`segments` is how many there are to be, if the program can be cut so often. None: as few as leave none that takes
    longer than `patience_us`, and only where the cuts cost little beside the program; one, if that is None too. The
    program is taken to be `slower` than predicted, so many times."""
    reason = why_whole(program)
    if reason:
        return Segmented((Segment(program, tuple(range(n_weights)), (), ()),), (), reason)
    demand = Demand(segments, patience_us, slower)
    parts = spread_where_read(with_places(program, n_weights, costs, demand), n_weights)
    chosen = choose_cuts(*points_of(parts, n_weights, costs), costs, demand)
    if not chosen.cuts:
        whole = Segment(program, tuple(range(n_weights)), (), ())
        return Segmented((whole,), (), chosen.why, chosen.times_us)
    return Builder(parts, n_weights, chosen.cuts).built(chosen.why, chosen.times_us)


def with_places(program: ClosedJaxpr, n_weights: int, costs: Costs, demand: Demand) -> ClosedJaxpr:
    """The program with scans that can be cut, where one takes longer than a segment is to take."""
    if demand.segments is not None:
        total_us = equations_us(program.jaxpr.eqns, costs)
        return split_scans(program, n_weights, costs=costs, longest_us=total_us / demand.segments, most=demand.segments)
    if demand.patience_us is None:
        return program
    return split_scans(program, n_weights, costs=costs, longest_us=demand.patience_us / demand.slower)


def spread_where_read(program: ClosedJaxpr, n_weights: int) -> ClosedJaxpr:
    """What is spread to a larger value is so once more for each who reads that: a mask of all layers waits as it came,
    and not once for each head and row."""
    spread = {eqn.outvars[0]: eqn for eqn in kept_apart(program, n_weights)[0] if spreads(eqn)}
    if not spread:
        return program
    eqns: list[J.Eqn] = []

    def read(atom: J.Atom) -> J.Atom:
        if isinstance(atom, J.Literal) or atom not in spread:
            return atom
        own = J.fresh(atom)
        eqns.append(J.respell(spread[atom], [read(a) for a in spread[atom].invars], [own]))
        return own

    for eqn in program.jaxpr.eqns:
        if not spread.keys().isdisjoint(eqn.outvars):
            continue
        own = {a: read(a) for a in dict.fromkeys(variables(eqn.invars)) if a in spread}
        eqns.append(J.respell(eqn, [J.read(own, a) for a in eqn.invars], eqn.outvars) if own else eqn)
    return J.close(J.invars(program), eqns, [read(a) for a in J.outvars(program)])


def spreads(eqn: J.Eqn) -> bool:
    return (
        eqn.primitive.name == "broadcast_in_dim"
        and len(eqn.invars) == 1
        and not isinstance(eqn.invars[0], J.Literal)
        and J.nbytes(eqn.invars[0].aval) < J.nbytes(eqn.outvars[0].aval)
    )


def why_whole(program: ClosedJaxpr) -> str:
    """The reason that a program is not cut, whatever is gained by it."""
    for eqn in program.jaxpr.eqns:
        held = sorted(J.primitives(eqn) & CALLBACKS)
        if held:
            return f"not cut: it holds a {held[0]}, which may raise and take the values of other lanes with it"
        if eqn.effects:
            return f"not cut: {eqn.primitive.name} has a side effect, and a segment that fails is run again"
        if not may_speculate(eqn):
            return "not cut: it holds a while_loop, which may not end in a lane that nobody uses, and reads no inputs"
    return ""


def kept_apart(program: ClosedJaxpr, n_weights: int) -> tuple[list[J.Eqn], list[J.Eqn]]:
    """(the equations to be cut, in order; those that depend on weights and literals alone, which run where needed)."""
    known: set[Any] = set(J.invars(program)[:n_weights])
    main: list[J.Eqn] = []
    free: list[J.Eqn] = []
    for eqn in program.jaxpr.eqns:
        cheap = J.primitives(eqn).isdisjoint({*HEAVY, *J.REGIONS})
        if cheap and not eqn.effects and all(isinstance(a, J.Literal) or a in known for a in eqn.invars):
            known.update(eqn.outvars)
            free.append(eqn)
        else:
            main.append(eqn)
    return main, free


def points_of(program: ClosedJaxpr, n_weights: int, costs: Costs) -> tuple[list[float], list[Point]]:
    """(microseconds of each equation to be cut, what is live before each but the first)."""
    main, _ = kept_apart(program, n_weights)
    live = live_before(spans_of(program, n_weights, main), len(main))
    points = [
        Point(at, sum(J.nbytes(v.aval) for v in values))
        for at, values in enumerate(live)
        if at and values and not any(J.is_key(v.aval) for v in values)
    ]
    return [equation_us(eqn, costs) for eqn in main], points


def spans_of(program: ClosedJaxpr, n_weights: int, main: Sequence[J.Eqn]) -> dict[Any, tuple[int, int]]:
    """Between which equations each value lives that may be live at a cut."""
    reads = [variables(eqn.invars) for eqn in main]
    binds = [[v for v in eqn.outvars if not J.is_drop(v)] for eqn in main]
    return lifetimes(J.invars(program)[n_weights:], reads, binds, variables(J.outvars(program)))


def variables(atoms: Iterable[Any]) -> list[Any]:
    return [a for a in atoms if not isinstance(a, J.Literal)]


def taken(free: Sequence[J.Eqn], needed: set[Any]) -> list[J.Eqn]:
    """Those of the equations that make what is needed, in order; adds what they read to it."""
    found: list[J.Eqn] = []
    for eqn in reversed(free):
        if not needed.isdisjoint(eqn.outvars):
            found.append(eqn)
            needed.update(variables(eqn.invars))
    return found[::-1]


class Builder:
    """The segments between given cuts, positions among the equations to be cut."""

    def __init__(self, program: ClosedJaxpr, n_weights: int, cuts: Sequence[int]) -> None:
        self.program = program
        self.weights = {v: w for w, v in enumerate(J.invars(program)[:n_weights])}
        self.inputs = J.invars(program)[n_weights:]
        self.main, self.free = kept_apart(program, n_weights)
        self.bounds = [0, *cuts, len(self.main)]
        lives = spans_of(program, n_weights, self.main)
        self.spans = {v: (self.segment_of(born), self.segment_of(last)) for v, (born, last) in lives.items()}
        self.register, self.structs = registers(self.spans)

    def segment_of(self, at: int) -> int:
        last = len(self.bounds) - 2
        return next((s for s in range(last) if at < self.bounds[s + 1]), last)

    def built(self, why: str, times_us: Sequence[float]) -> Segmented:
        segments = tuple(map(self.one, range(len(self.bounds) - 1)))
        return Segmented(segments, self.structs, why, tuple(times_us))

    def one(self, s: int) -> Segment:
        own = self.main[self.bounds[s] : self.bounds[s + 1]]
        is_last = s == len(self.bounds) - 2
        outs = J.outvars(self.program) if is_last else [v for v, (a, b) in self.spans.items() if a == s < b]
        needed = {*variables(outs), *(a for eqn in own for a in variables(eqn.invars))}
        free = taken(self.free, needed)
        weights = [v for v in self.weights if v in needed]
        ins = [v for v in self.register if v in needed and self.spans[v][0] < s] if s else self.inputs
        jaxpr = J.close([*weights, *ins], [*free, *own], outs, f"segment {s}")
        return Segment(
            jaxpr,
            tuple(self.weights[v] for v in weights),
            tuple(self.register[v] for v in ins) if s else (),
            () if is_last else tuple(self.register[v] for v in outs if not isinstance(v, J.Literal)),
        )


def registers(spans: dict[Any, tuple[int, int]]) -> tuple[dict[Any, int], tuple[jax.ShapeDtypeStruct, ...]]:
    """(the register of each value that is live at a cut, the types of all). One is free again after the last segment
    that reads it."""
    register: dict[Any, int] = {}
    structs: list[jax.ShapeDtypeStruct] = []
    busy: list[int] = []  # until which segment, of each register
    for var, (born, last) in sorted(spans.items(), key=lambda item: item[1][0]):
        if born == last:
            continue
        struct = J.aval_struct(var.aval)
        like = (struct.shape, struct.dtype, struct.weak_type)
        fitting = (r for r, s in enumerate(structs) if busy[r] < born and (s.shape, s.dtype, s.weak_type) == like)
        r = next(fitting, None)
        if r is None:
            r = len(structs)
            structs.append(struct)
            busy.append(last)
        register[var], busy[r] = r, last
    return register, tuple(structs)


def lines_of(segmented: Segmented) -> Iterator[str]:
    names = Names()
    for i, own in enumerate(segmented.segments):
        args, n = J.invars(own.jaxpr), len(own.weights)
        weights, inputs = (", ".join(map(names.typed, part)) for part in (args[:n], args[n:]))
        yield f"segment {i}({weights} | {inputs})"
        yield from body_lines(own.jaxpr, names, "  ")
        for var, r in zip(J.outvars(own.jaxpr), own.writes, strict=False):
            yield f"  live {names(var)} in register {r}"
    if segmented.why:
        yield f"# {segmented.why}"
