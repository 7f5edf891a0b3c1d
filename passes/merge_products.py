"""Products of one left operand by weights become one product, and slices of its result.

Before                                                  After
    a(%0:f32[4,8], %1:f32[4,2] | %2:f32[3,4])               a(%0:f32[4,8], %1:f32[4,2] | %2:f32[3,4])
      %3:f32[3,8] = dot_general %2 %0                         %3:f32[4,10] = concatenate %0 %1 [dimension=1]
      %4:f32[3,2] = dot_general %2 %1                         %4:f32[3,10] = dot_general %2 %3
      ...                                                     %5:f32[3,8] = slice %4 [limit_indices=(3,8) ...]
                                                              %6:f32[3,2] = slice %4 [limit_indices=(3,10) ...]

The Q, K and V of attention, the gates of a recurrent cell: one product of all columns is one launch instead of three,
with three times the work. Where weights are added to each of them and nobody else reads them, what is sliced is the sum
with all of these: a kernel adds a bias to its product, and attention reads queries, keys and values as they lie. The
weights are laid side by side by `hoist_weights`, once a tenant; XLA, which merges such products too, would do it in
every call.

Merged are products that differ in a free dimension of their right operands alone, and that are wanted about as soon:
the keys of all layers that attend to one memory are not computed before the first. In one program no weight of a
product comes to lie in the bank twice by it: everything that reads one of the weights reads it as part of the same
product, and the same tenants share it. Products of images, whose rows are positions, stay: they have rows enough, and a
kernel that runs what follows each. Nor do convolutions merge, for the same reason.

What is merged depends on no order in which a program was written, so that its like is one family with it. Nor on how
large a request is, so that a tenant's request shapes share their weights, but for one case: operands that are equal at
some sizes alone are one operand there, as `x` and its first row are in a request of one row. Then that request shape
has weights of its own.

Relies on cse, which makes equal left operands one. The rule is in `mergeable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import lax
from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.passes.canonical_rules import freeze, keep
from coalesce.passes.lift_from_steps import behind
from coalesce.passes.mergeable import added_to, columns, Group, mergeable, Path
from coalesce.program import Program
from coalesce.rewrite import Rewriter, Staged


def merge_products(program: Program) -> Program:
    if program.prepare is not None:  # weights lie as they will lie
        return program
    groups = mergeable(program)
    return program.with_jaxpr(merged(program.jaxpr, (), groups, Rewriter({}))) if groups else program


def merged(jaxpr: ClosedJaxpr, path: Path, groups: dict[Path, list[Group]], rewriter: Rewriter) -> ClosedJaxpr:
    """The scope with its groups merged, each where its first product stood, and its regions with theirs."""
    eqns = jaxpr.jaxpr.eqns
    own = groups.get(path, [])
    firsts = {min(member.place for member in group.members): group for group in own}
    gone = {member.place for group in own for member in (*group.members, *group.sums)}
    splicer, env = J.Splicer(), dict[Any, J.Atom]()
    emitted: set[int] = set()

    def emit(place: int) -> None:
        eqn = eqns[place]
        emitted.add(place)
        old = J.regions(eqn)
        inner = [merged(region, (*path, place, r), groups, rewriter) for r, region in enumerate(old)]
        ins = [J.read(env, a) for a in eqn.invars]
        same = all(a is b for a, b in zip([*ins, *inner], [*eqn.invars, *old], strict=True))
        splicer.eqns.append(eqn if same else J.respell(eqn, ins, eqn.outvars, inner or None))

    places = {id(eqn): place for place, eqn in enumerate(eqns)}
    for place in range(len(eqns)):
        if place in firsts:
            products, sums = ([eqns[m.place] for m in own] for own in (firsts[place].members, firsts[place].sums))
            terms = [
                a for product, total in zip(products, sums, strict=False) for a in added_to(product.outvars[0], total)
            ]
            for needed in behind(eqns, [*(product.invars[1] for product in products), *terms]):
                if places[id(needed)] not in emitted:
                    emit(places[id(needed)])
            env.update(side_by_side(products, terms, sums or products, env, splicer, rewriter))
        elif place not in gone and place not in emitted:
            emit(place)
    unchanged = not own and all(a is b for a, b in zip(splicer.eqns, eqns, strict=True))
    outs = [J.read(env, a) for a in J.outvars(jaxpr)]
    return jaxpr if unchanged else J.close(J.invars(jaxpr), splicer.eqns, outs)


def side_by_side(
    products: Sequence[J.Eqn],
    terms: Sequence[J.Atom],
    ends: Sequence[J.Eqn],
    env: dict[Any, J.Atom],
    splicer: J.Splicer,
    rewriter: Rewriter,
) -> list[tuple[Any, J.Atom]]:
    """Emit the product of all, what is added to it, and its slices: (result of an equation of `ends`, what stands for
    it)."""
    weights = [product.invars[1] for product in products]
    args = [J.read(env, a) for a in (products[0].invars[0], *weights, *terms)]
    options = {"columns": columns(products[0]), "count": len(products), **freeze(products[0].params)}
    slices = splicer.inline(rewriter.fragment(Staged(one_product, args, options)), args, like=products[0])
    return [(end.outvars[0], out) for end, out in zip(ends, slices, strict=True)]


def one_product(lhs: Any, *given: Any, columns: tuple[int, int], count: int, **params: Any) -> list[Any]:
    weights, terms, (dim, place) = given[:count], given[count:], columns
    out = lax.dot_general(lhs, lax.concatenate(weights, dim), **keep(params))
    if terms:
        out = lax.add(out, lax.concatenate(terms, place))
    ends = [sum(w.shape[dim] for w in weights[: i + 1]) for i in range(count)]
    parts = zip([0, *ends], ends, strict=False)
    return [lax.slice_in_dim(out, start, end, axis=place) for start, end in parts]
