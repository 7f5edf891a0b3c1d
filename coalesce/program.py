"""One tenant's program: what `trace` gives and every per-program pass maps to itself.

    Leaf       one raw weight: a leaf of params, or an array that the function closed over
    Program    the jaxpr `(weights..., inputs...) -> outputs`, and what is needed to call it and to give results back

`prepare` is None until `hoist_weights` ran; then it maps the raw weights to the weights that `jaxpr` takes.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.errors import IRError
from coalesce.text import program_lines


@dataclass(frozen=True, eq=False)
class Leaf:
    """One raw weight. `value` is an array, or None for params given as ShapeDtypeStructs."""

    path: str  # as jax.tree_util.keystr prints it; "constant 0" for closed-over arrays
    aval: jax.ShapeDtypeStruct
    value: Any = field(repr=False)
    shared: bool = False  # declared by `trace(shared=)`: equal bytes are one array
    constant: bool = False  # closed over: equal bytes are one array
    holders: Hashable = None  # equal for weights that the same tenants have in common, as far as that is known

    @property
    def unreadable(self) -> str:
        """Why its value cannot be read; empty if it can."""
        where = self.path if self.constant else f"params{self.path}"
        if isinstance(self.value, Tracer):
            return f"{where} is a traced value, as inside jax.jit, vmap or grad; give arrays, outside of these"
        if isinstance(self.value, jax.Array) and self.value.is_deleted():
            return f"{where} was deleted (donated?) since it was traced; trace the tenant again with arrays that live"
        return ""


@dataclass(frozen=True, eq=False)
class Slot:
    """One flat input or output: its place in the pytree, its type, and the key implementation if it is a PRNG key."""

    path: str
    aval: jax.ShapeDtypeStruct  # of the key data, for a PRNG key
    key_impl: Any = None


@dataclass(frozen=True, eq=False)
class Program:
    """A tenant's traced model."""

    name: str
    jaxpr: ClosedJaxpr
    leaves: tuple[Leaf, ...]
    inputs: tuple[Slot, ...]
    in_tree: Any  # of the tuple of inputs
    outputs: tuple[Slot, ...]
    out_tree: Any
    prepare: ClosedJaxpr | None = None

    @property
    def n_weights(self) -> int:
        return len(self.jaxpr.jaxpr.invars) - len(self.inputs)

    @property
    def weights(self) -> tuple[J.Var, ...]:
        return tuple(self.jaxpr.jaxpr.invars[: self.n_weights])

    @property
    def abstract(self) -> bool:
        """Whether some weight has no value, so that the program can be inspected but not called."""
        return any(leaf.value is None for leaf in self.leaves)

    @property
    def wide(self) -> str:
        """The first type of 64 bits among what it takes, keeps and gives; empty if there is none."""
        return first_wide(own.aval for own in (*self.leaves, *self.weights, *self.inputs, *self.outputs))

    @property
    def wide_inside(self) -> str:
        """And among what it computes."""
        return self.wide or first_wide(out.aval for eqn in J.walk(self.jaxpr) for out in eqn.outvars)

    def why_wide(self, rebuilt: Collection[str]) -> str:
        """What of it takes jax_enable_x64, which its function may set for itself; empty if nothing does. `rebuilt`:
        primitives that do not run as they were traced."""
        given = first_wide(own.aval for own in (*self.leaves, *self.inputs, *self.outputs))
        if given:
            return f"was traced with jax_enable_x64 and has {given}"
        if self.wide:
            return f"widens weights to {self.wide}, once and for all requests, which takes jax_enable_x64"
        eqns = (eqn for eqn in J.walk(self.jaxpr) if eqn.primitive.name in rebuilt)
        inside = first_wide(atom.aval for eqn in eqns for atom in (*eqn.invars, *eqn.outvars))
        return inside and f"has {inside} in a loop, a branch or a product, which takes jax_enable_x64"

    def with_jaxpr(self, jaxpr: ClosedJaxpr, prepare: ClosedJaxpr | None = None) -> Program:
        return replace(self, jaxpr=jaxpr, prepare=prepare if prepare is not None else self.prepare)

    def without_values(self) -> Program:
        """The program without its weights, which a bank holds by then."""
        return replace(self, leaves=tuple(replace(leaf, value=None) for leaf in self.leaves))

    def held_by(self, holders: Sequence[Hashable]) -> Program:
        """The program without its weights, of which is known who holds them."""
        leaves = zip(self.leaves, holders, strict=True)
        return replace(self, leaves=tuple(replace(leaf, value=None, holders=who) for leaf, who in leaves))

    def __str__(self) -> str:
        lines = list(program_lines(self.name, self.jaxpr, self.n_weights))
        if self.prepare is not None and self.prepare.jaxpr.eqns:
            lines += program_lines("  prepare", self.prepare, len(self.leaves))
        return "\n".join(lines)


def why_wide(programs: Sequence[Program], rebuilt: Collection[str]) -> str:
    """Which of them takes jax_enable_x64, and why; empty if none does."""
    traced = {id(p.jaxpr): p for p in reversed(programs)}  # the first program of each traced function
    found = ((p.name, p.why_wide(rebuilt)) for p in reversed(traced.values()))
    return next((f"tenant {name!r} {why}" for name, why in found if why), "")


def first_wide(avals: Iterable[Any]) -> str:
    return next((J.short(aval) for aval in avals if J.is_wide(aval)), "")


def check(program: Program, strict: bool = False) -> None:
    """Raise IRError unless the program is well formed: every variable bound once and before use, the signature that
    `trace` recorded, prepared weights that fit. `strict` adds JAX's own check of every equation's types."""
    check_scope(program.name, program.jaxpr)
    ins = [J.aval_struct(v.aval) for v in J.invars(program.jaxpr)[program.n_weights :]]
    outs = [J.aval_struct(v.aval) for v in J.outvars(program.jaxpr)]
    for kind, got, want in (("input", ins, program.inputs), ("output", outs, program.outputs)):
        if len(got) != len(want):
            raise IRError(f"tenant {program.name!r}: {len(got)} {kind}s, traced with {len(want)}")
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            if (g.shape, g.dtype) != (w.aval.shape, w.aval.dtype):
                raise IRError(f"tenant {program.name!r}: {kind} {i} is {J.short(g)}, traced as {J.short(w.aval)}")
    raw = program.weights
    if program.prepare is not None:
        check_scope(f"{program.name}' prepare", program.prepare)
        check_avals(program.name, "prepared weight", J.outvars(program.prepare), program.weights)
        raw = J.invars(program.prepare)
    check_avals(program.name, "weight", raw, program.leaves)
    if strict:
        J.verify(program.jaxpr)
        if program.prepare is not None:
            J.verify(program.prepare)


def check_avals(tenant: str, what: str, got: Sequence[Any], want: Sequence[Any]) -> None:
    if len(got) != len(want):
        raise IRError(f"tenant {tenant!r}: {len(got)} {what}s, expected {len(want)}")
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if (g.aval.shape, g.aval.dtype) != (w.aval.shape, w.aval.dtype):
            raise IRError(f"tenant {tenant!r}: {what} {i} is {J.short(g.aval)}, expected {J.short(w.aval)}")


def check_scope(tenant: str, jaxpr: ClosedJaxpr, where: str = "") -> None:
    if jaxpr.consts:
        raise IRError(f"tenant {tenant!r}: {where or 'the program'} holds {len(jaxpr.consts)} constants")
    bound = set(J.invars(jaxpr))
    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        place = f"{where}equation {i} ({eqn.primitive.name})"
        for atom in eqn.invars:
            if not isinstance(atom, J.Literal) and atom not in bound:
                raise IRError(f"tenant {tenant!r}: {place} reads a variable that nothing binds")
        for region in J.regions(eqn):
            check_scope(tenant, region, f"{place}, ")
        for var in eqn.outvars:
            if not J.is_drop(var) and var in bound:
                raise IRError(f"tenant {tenant!r}: {place} binds a variable a second time")
            bound.add(var)
    for atom in J.outvars(jaxpr):
        if not isinstance(atom, J.Literal) and atom not in bound:
            raise IRError(f"tenant {tenant!r}: {where}an output is a variable that nothing binds")
