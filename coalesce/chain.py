"""A fused program in several executables, called one after the other without waiting: see `passes/cut_executables.py`.

The program is traced as a whole, with the equations of each part in a scope of its own, and its jaxpr is cut:

    (weights, inputs) -> values of part 0 -> values of part 1 -> ... -> results

A part reads arguments, and what parts before it left on the device; what is read for the last time is donated where the
part makes an array of its type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.heavy import HEAVY
from coalesce.lower import part_name
from coalesce.passes.live import lifetimes
from coalesce.passes.segment import kept_apart, taken, variables


@dataclass(frozen=True, eq=False)
class Link:
    """`reads` and `over` are places among the arguments and what the parts before left."""

    jaxpr: ClosedJaxpr
    reads: tuple[int, ...]
    over: tuple[int, ...]  # what nobody needs after it
    donated: tuple[int, ...]  # positions in `reads` of what it may write over: no argument, which is the caller's


@dataclass(frozen=True, eq=False)
class Cut:
    links: tuple[Link, ...]
    results: tuple[int, ...]  # places among the arguments and what all parts left


class Chain:
    """What JAX's Compiled is for one executable, as far as it is called and looked at: with the arguments that it was
    compiled for, of which none is a tracer: nothing has run when it refuses another pytree, or a tracer."""

    def __init__(self, executables: Sequence[Any], cut: Cut, in_tree: Any, out_tree: Any) -> None:
        self.executables = tuple(executables)
        self.in_tree, self.out_tree = in_tree, out_tree
        self._results = cut.results
        self._steps = [(run, link.reads, link.over) for run, link in zip(executables, cut.links, strict=True)]
        often = Counter(i for link in cut.links for i in set(link.reads) if i < in_tree.num_leaves)
        self._shared = [i for i, times in often.items() if times > 1]  # arguments of more than one part

    def __call__(self, *arguments: Any) -> Any:
        values, tree = jax.tree.flatten(arguments)
        if tree != self.in_tree:
            raise TypeError(f"compiled for arguments {self.in_tree}, called with {tree}")
        if any(issubclass(kind, Tracer) for kind in {*map(type, values)}):  # a few kinds of hundreds of values
            raise TypeError("several executables are no part of another program: call the fused program, or its jaxpr")
        for i in self._shared:
            if not isinstance(values[i], jax.Array):
                values[i] = jnp.asarray(values[i])  # moved to the device once
        for call, reads, done in self._steps:
            values += call(*[values[i] for i in reads])
            for i in done:
                values[i] = None
        return self.out_tree.unflatten([values[i] for i in self._results])

    def as_text(self) -> str:
        return "\n\n".join(executable.as_text() for executable in self.executables)

    def cost_analysis(self) -> list[Any]:
        return [executable.cost_analysis() for executable in self.executables]

    def memory_analysis(self) -> list[Any]:
        return [executable.memory_analysis() for executable in self.executables]


def compile_parts(
    function: Callable[..., Any], structs: tuple[Any, Any], parts: int, options: Mapping[str, Any] | None = None
) -> Any:
    """JAX's Compiled of `function(bank, inputs)`, or a Chain if its equations are of several parts."""
    options = dict(options) if options else None
    with J.precision_as_traced():
        if parts == 1:
            return jax.jit(function).lower(*structs).compile(compiler_options=options)
        whole, out = J.stage(function, *structs)
        found = cut(whole, len(jax.tree.leaves(structs[0])), parts)
        jitted = [jitted_link(f"{function.__name__}_part{i}", link) for i, link in enumerate(found.links)]
        lowered = [
            own.lower(*(J.aval_struct(v.aval) for v in J.invars(link.jaxpr)))
            for own, link in zip(jitted, found.links, strict=True)
        ]
    executables = [own.compile(compiler_options=options) for own in lowered]
    return Chain(executables, found, jax.tree.structure(tuple(structs)), jax.tree.structure(out))


def jitted_link(name: str, link: Link) -> Any:
    def part(*args: Any) -> list[Any]:
        return J.evaluate(link.jaxpr, args)

    part.__name__ = part.__qualname__ = name
    return jax.jit(part, donate_argnums=link.donated)


def cut(whole: ClosedJaxpr, n_weights: int, parts: int) -> Cut:
    args, splicer = [J.fresh(v) for v in J.invars(whole)], J.Splicer()
    outs = splicer.inline(whole, args)  # constants become literals
    main, free = kept_apart(J.close(args, splicer.eqns, outs), n_weights)
    part_of = placed(main, parts)
    own = [[eqn for eqn, part in zip(main, part_of, strict=True) if part == p] for p in range(parts)]
    binds = [[v for eqn in eqns for v in eqn.outvars if not J.is_drop(v)] for eqns in own]
    reads = [variables(a for eqn in eqns for a in eqn.invars) for eqns in own]
    spans = lifetimes((), reads, binds)
    maker = {v: p for p, made in enumerate(binds) for v in made}
    # What is no part's, an argument or a number that is a result, is the last one's to give back.
    results = [[a for a in outs if made_in(maker, a, parts - 1) == p] for p in range(parts)]
    mine = [set(variables(each)) for each in results]
    handed = [[v for v in binds[p] if v in spans and spans[v][1] > p and v not in mine[p]] for p in range(parts)]
    made = [[*results[p], *handed[p]] for p in range(parts)]
    starts = [*accumulate(map(len, made), initial=len(args))]
    place = {v: i for i, v in enumerate(args)}
    jaxprs: list[ClosedJaxpr] = []
    for p in range(parts):
        needed = {*reads[p], *variables(made[p])}
        eqns = [*taken(free, needed), *own[p]]
        jaxprs.append(J.close([v for v in place if v in needed], eqns, made[p], f"part {p}"))
        for at, atom in enumerate(made[p], starts[p]):
            if not isinstance(atom, J.Literal):
                place.setdefault(atom, at)
    links = linked(jaxprs, place, {*variables(outs)}, {*args})
    return Cut(tuple(links), result_places(outs, maker, parts, starts))


def linked(jaxprs: Sequence[ClosedJaxpr], place: Mapping[Any, int], kept: set[Any], args: set[Any]) -> list[Link]:
    """Parts that follow one another. `place` says where what they read lies, `kept` what none of them lets go."""
    last = {v: p for p, jaxpr in enumerate(jaxprs) for v in J.invars(jaxpr)}
    found: list[Link] = []
    for p, jaxpr in enumerate(jaxprs):
        ins = J.invars(jaxpr)
        over = [v for v in ins if last[v] == p and v not in kept]
        donated = reused(ins, {*over} - args, J.outvars(jaxpr))
        found.append(Link(jaxpr, tuple(place[v] for v in ins), tuple(place[v] for v in over), donated))
    return found


def made_in(maker: Mapping[Any, int], atom: Any, otherwise: int) -> int:
    return otherwise if isinstance(atom, J.Literal) else maker.get(atom, otherwise)


def result_places(outs: Sequence[Any], maker: Mapping[Any, int], parts: int, starts: Sequence[int]) -> tuple[int, ...]:
    """Where each result lies: a part leaves its own first, in order."""
    after = list(starts)
    found: list[int] = []
    for atom in outs:
        p = made_in(maker, atom, parts - 1)
        found.append(after[p])
        after[p] += 1
    return tuple(found)


def placed(eqns: Sequence[J.Eqn], parts: int) -> list[int]:
    """The part of each equation: that of its scope. What is in none, and what is light and made of arguments alone,
    belongs to the first that reads it; what was made of values of parts, to the last of them."""
    numbers = {part_name(p): p for p in range(parts)}
    maker: dict[Any, int] = {}
    found: list[int | None] = []
    for eqn in eqns:
        scope = next((numbers[name] for name in J.scopes(eqn) if name in numbers), None)
        before = max((maker[a] for a in variables(eqn.invars) if a in maker), default=None)
        assert scope is None or before is None or before <= scope, f"part {scope} reads what part {before} makes"
        part = before if scope is None or (before is None and is_light(eqn)) else scope
        if part is not None:
            maker.update(dict.fromkeys(eqn.outvars, part))
        found.append(part)
    reader: dict[Any, int] = {}
    placed: list[int] = []
    for eqn, part in zip(reversed(eqns), reversed(found), strict=True):
        own = min((reader[v] for v in eqn.outvars if v in reader), default=0) if part is None else part
        placed.append(own)
        reader.update((a, min(own, reader.get(a, own))) for a in variables(eqn.invars))
    return placed[::-1]


def is_light(eqn: J.Eqn) -> bool:
    return eqn.primitive.name not in HEAVY and not eqn.effects and next(J.subjaxprs(eqn), None) is None


def reused(ins: Sequence[Any], over: Iterable[Any], outs: Sequence[Any]) -> tuple[int, ...]:
    """Which of some arguments, nobody else's by then, an array that is made may take the place of."""
    room = Counter((J.shape(a), J.dtype(a)) for a in outs)
    found: list[int] = []
    for i, v in enumerate(ins):
        kind = J.shape(v), J.dtype(v)
        if v in over and room[kind]:
            room[kind] -= 1
            found.append(i)
    return tuple(found)
