"""The machine under `canonicalize`: apply per-primitive rules to a jaxpr, region by region, until none fires.

A rule sees one equation through a View and answers None (keep it), the atoms that replace its results, or a Staged:
ordinary `lax` code to trace in its place. Fragments are traced once per (code, options, operand types).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J


@dataclass(frozen=True)
class Staged:
    """`fn(*args, **options)` in the place of an equation; options are hashable."""

    fn: Callable[..., Any]
    args: Sequence[J.Atom]
    options: Mapping[str, Any] = field(default_factory=dict)


Answer = None | list[J.Atom] | Staged | J.Eqn


@dataclass(frozen=True)
class View:
    """An equation, its operands as rewritten so far, and what is known of them."""

    eqn: J.Eqn
    producer: Mapping[Any, J.Eqn]
    weight_only: frozenset[Any] | set[Any]
    depths: Mapping[Any, int] = field(default_factory=dict)

    @property
    def operands(self) -> list[Any]:
        return list(self.eqn.invars)

    @property
    def result(self) -> Any:
        return self.eqn.outvars[0]

    def definition(self, atom: J.Atom, primitive: str) -> J.Eqn | None:
        """The equation that made `atom`, if it is of that primitive."""
        made = None if isinstance(atom, J.Literal) else self.producer.get(atom)
        return made if made is not None and made.primitive.name == primitive else None

    def is_weight(self, atom: J.Atom) -> bool:
        return isinstance(atom, J.Literal) or atom in self.weight_only

    def depth(self, atom: J.Atom) -> int:
        """How many of the primitives that count lie on the longest way to `atom`, in its region."""
        return 0 if isinstance(atom, J.Literal) else self.depths.get(atom, 0)


Rules = Mapping[str, Sequence[Callable[[View], Answer]]]


def depends_on_weights_alone(eqn: J.Eqn, known: set[Any]) -> bool:
    return not eqn.effects and all(isinstance(a, J.Literal) or a in known for a in eqn.invars)


def flags(atoms: Sequence[J.Atom], known: set[Any]) -> list[bool]:
    return [isinstance(a, J.Literal) or a in known for a in atoms]


def region_flags(eqn: J.Eqn, known: set[Any]) -> list[list[bool]]:
    """For each region of a control-flow equation, which of its arguments depend on weights alone in every iteration."""
    match eqn.primitive.name:
        case "scan":
            scan = J.as_scan(eqn)
            return [flags(scan.consts, known) + [False] * (len(scan.init) + len(scan.xs))]
        case "while":
            loop = J.as_while(eqn)
            rest = [False] * len(loop.init)
            return [flags(loop.cond_consts, known) + rest, flags(loop.body_consts, known) + rest]
        case "cond":
            cond = J.as_cond(eqn)
            return [flags(cond.operands, known) for _ in cond.branches]
    return []


class Rewriter:
    """Applies `rules` to a fixpoint. One object a pass call; it keeps the traced fragments. Primitives that are
    `counted` are those of `View.depth`."""

    def __init__(self, rules: Rules, counted: frozenset[str] = frozenset()) -> None:
        self.rules, self.counted = rules, counted
        self.fragments: dict[Any, ClosedJaxpr] = {}

    def __call__(self, jaxpr: ClosedJaxpr, weight_args: Sequence[bool]) -> ClosedJaxpr:
        for _ in range(100):
            swept = self.sweep(jaxpr, weight_args)
            if swept is jaxpr:
                return jaxpr
            jaxpr = swept
        raise AssertionError(f"rules undo each other: {len(jaxpr.jaxpr.eqns)} equations still change after 100 sweeps")

    def sweep(self, jaxpr: ClosedJaxpr, weight_args: Sequence[bool]) -> ClosedJaxpr:
        env: dict[Any, J.Atom] = {}
        producer: dict[Any, J.Eqn] = {}
        depths: dict[Any, int] = {}
        known = {v for v, flag in zip(J.invars(jaxpr), weight_args, strict=True) if flag}
        splicer = J.Splicer()
        changed = False
        for old in jaxpr.jaxpr.eqns:
            ins = [J.read(env, a) for a in old.invars]
            eqn = old if all(a is b for a, b in zip(ins, old.invars, strict=True)) else J.respell(old, ins, old.outvars)
            inner = J.regions(eqn)
            new_inner = [self(r, flags) for r, flags in zip(inner, region_flags(eqn, known), strict=True)]
            if any(a is not b for a, b in zip(inner, new_inner, strict=True)):
                eqn = J.respell(eqn, ins, eqn.outvars, new_inner)
            start = len(splicer.eqns)
            answer = self.apply(View(eqn, producer, known, depths))
            changed |= eqn is not old or answer is not None
            if isinstance(answer, Staged):
                answer = splicer.inline(self.fragment(answer), answer.args, like=eqn)
            if isinstance(answer, list):
                env.update((v, a) for v, a in zip(eqn.outvars, answer, strict=True) if not J.is_drop(v))
            else:
                splicer.eqns.append(answer if answer is not None else eqn)
            for made in splicer.eqns[start:]:
                producer.update((v, made) for v in made.outvars if not J.is_drop(v))
                before = max((depths.get(a, 0) for a in made.invars if not isinstance(a, J.Literal)), default=0)
                depth = before + (made.primitive.name in self.counted)
                depths.update((v, depth) for v in made.outvars if not J.is_drop(v))
                if depends_on_weights_alone(made, known):
                    known.update(v for v in made.outvars if not J.is_drop(v))
        if not changed:
            return jaxpr
        return J.close(J.invars(jaxpr), splicer.eqns, [J.read(env, a) for a in J.outvars(jaxpr)])

    def apply(self, view: View) -> Answer:
        for rule in self.rules.get(view.eqn.primitive.name, ()):
            answer = rule(view)
            if answer is not None:
                return answer
        return None

    def fragment(self, staged: Staged) -> ClosedJaxpr:
        structs = tuple(J.aval_struct(a.aval) for a in staged.args)
        key = (staged.fn, tuple(sorted(staged.options.items())), structs)
        if key not in self.fragments:
            with J.precision_as_traced():
                jaxpr, _ = J.stage(lambda *args: staged.fn(*args, **staged.options), *structs)
            self.fragments[key] = jaxpr
        return self.fragments[key]
