"""A pack: its members' operands brought together, one superkernel, and each member's result.

L lanes of a member; G problems with a right operand of their own, R lanes on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from coalesce import jaxpr as J
from coalesce.bundle import epilogue_reads, folds_of, Pack
from coalesce.family import Family
from coalesce.heavy import HeavyOp
from coalesce.kernels import as_product, FUSING, KERNELS
from coalesce.kernels.epilogue import COLUMN, Epilogue, on_tile, WHOLE
from coalesce.lanes import Banked, join, Joint, LaneValue, masked, plain, Shared, Stacked, stacked, take
from coalesce.layout import Layout, pad_to
from coalesce.member import Fold, Member
from coalesce.slab import Cut, whole
from coalesce.unify import contracted


def lower_pack(
    pack: Pack, families: Sequence[Family], lhs: Sequence[LaneValue], rhs: Any, given: Sequence[LaneValue] = ()
) -> list[LaneValue]:
    """Each member's result, from the left operands of all; `rhs` is the pack's array, or the right operands of all, and
    `given` what its epilogue reads."""
    folds = folds_of(pack, families)
    of_one = partial(of_a_family, given=given)
    rule = {"": of_one, "equal": stacked_pack, "padded": stacked_pack, "product": product_pack}[pack.form]
    return rule(pack, folds, lhs, rhs)


def superkernel(pack: Pack, lhs: Any, rhs: Any, given: Sequence[Any] = ()) -> Any:
    """[G,R,*lhs] and [G,...] in the kernel's layout -> [G,R,*out], as a call of the pack's name."""

    def run(x: Any, w: Any, *operands: Any) -> Any:
        if pack.kernel in FUSING:
            epilogue = epilogue_of(pack) if pack.epilogue else None
            return FUSING[pack.kernel].run(pack.op, x, w, epilogue=epilogue, operands=operands, blocks=pack.blocks)
        return KERNELS[pack.kernel].run(pack.op, x, whole(w))

    run.__name__ = run.__qualname__ = pack.name
    with J.context_of(pack.members[0].eqn), jax.named_scope(pack.name):
        return jax.jit(run)(lhs, rhs, *given)


def epilogue_of(pack: Pack) -> Epilogue:
    """The pack's epilogue on tiles: its steps are elementwise, and a broadcast is its operand's tile already."""
    reads = epilogue_reads(pack)

    def apply(result: Any, *tiles: Any) -> Any:
        env = dict(zip([pack.members[0].eqn.outvars[0], *reads], [result, *tiles], strict=True))
        for step in pack.epilogue:
            args = [J.literal_value(a) if isinstance(a, J.Literal) else env[a] for a in step.eqn.invars]
            broadcast = step.eqn.primitive.name == "broadcast_in_dim"
            env[step.eqn.outvars[0]] = args[0] if broadcast else on_tile(step.eqn, args)
        return env[pack.epilogue[-1].eqn.outvars[0]]

    kinds = tuple(WHOLE if J.shape(a) == pack.op.out.shape else COLUMN for a in reads)
    return Epilogue(apply, kinds, J.dtype(pack.epilogue[-1].eqn.outvars[0]))


# ---- one family: lanes share operands as they are ------------------------------------------------------------------


def of_a_family(
    pack: Pack, folds: Sequence[Fold], lhs: Sequence[LaneValue], rhs: Any, given: Sequence[LaneValue] = ()
) -> list[LaneValue]:
    layout = KERNELS[pack.kernel].layout(pack.op)
    left = [left_of(value, how) for value, how in zip(lhs, folds, strict=True)]
    if pack.array is None:
        rhs = concatenated([right_of(value, layout) for value in rhs])
    operands = [
        left_of(value, folds[0]) if J.shape(atom) == pack.op.out.shape else column_of(value, folds[0], pack.op)
        for value, atom in zip(given, epilogue_reads(pack), strict=True)
    ]
    out = superkernel(pack, concatenated(left), rhs, operands)
    return unfolded(out, pack.members, folds)


def left_of(value: LaneValue, how: Fold) -> Any:
    """The left operand as [G, R, ...]."""
    value = plain(value)
    if isinstance(value, Shared):
        return jnp.broadcast_to(value.value, (how.groups, how.per_group, *jnp.shape(value.value)))
    x = take(value.value, [i for group in how.order for i in group])
    return x.reshape(how.groups, how.per_group, *x.shape[1:])


def column_of(value: LaneValue, how: Fold, op: HeavyOp) -> Any:
    """A vector over a result's columns as [G, R, N]; a cut of a slab as it is, if problem g reads row g of it."""
    if isinstance(value, Banked) and isinstance(value.array, Cut) and how.per_group == 1 and op.batch == 1:
        if [value.rows[group[0]] for group in how.order] == list(range(how.groups)):
            return value.array
    x = left_of(value, how)
    return x.reshape(*x.shape[:2], op.n)


def right_of(value: LaneValue, layout: Layout) -> Any:
    """A right operand that is no weight, as [G, ...] in the kernel's layout."""
    value = plain(value)
    x = value.value[None] if isinstance(value, Shared) else value.value
    return jax.vmap(layout)(x)


def concatenated(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def unfolded(out: Any, members: Sequence[Member], folds: Sequence[Fold]) -> list[LaneValue]:
    """[sum of G, R, ...] -> each member's result for its lanes."""
    results: list[LaneValue] = []
    start = 0
    for member, how in zip(members, folds, strict=True):
        flat = out[start : start + how.groups].reshape(how.groups * how.per_group, *out.shape[2:])
        start += how.groups
        if member.width > 1 and (member.lhs_varies or member.rhs_varies):
            results.append(Stacked(take(flat, how.place)))
        else:
            results.append(Shared(flat[0]))
    return results


# ---- several members of one geometry: operands and results are one stack -------------------------------------------


def stacked_pack(pack: Pack, folds: Sequence[Fold], lhs: Sequence[LaneValue], rhs: Any) -> list[LaneValue]:
    (how,), op, lanes = folds, pack.op, [m.width for m in pack.members]
    left_dims, right_dims = contracted(op)
    x = take(masked(join(lhs, lanes, op.lhs.shape), left_dims).value, [i for group in how.order for i in group])
    if pack.array is None:
        w = masked(join(rhs, lanes, op.rhs.shape), right_dims).value
        rhs = jax.vmap(KERNELS[pack.kernel].layout(op))(take(w, [group[0] for group in how.order]))
    out = superkernel(pack, x.reshape(how.groups, how.per_group, *op.lhs.shape), rhs)
    flat = take(out.reshape(how.groups * how.per_group, *op.out.shape), how.place)
    return list(Joint(flat, tuple(lanes), tuple(tuple(m.op.out.shape) for m in pack.members)).parts())


# ---- several members with nothing but arithmetic in common: plain matrix products ------------------------------------


def product_pack(pack: Pack, folds: Sequence[Fold], lhs: Sequence[LaneValue], rhs: Any) -> list[LaneValue]:
    layout, (m, k), (_, n) = KERNELS[pack.kernel].layout(pack.op), pack.op.lhs.shape, pack.op.rhs.shape
    left = [as_product.left(p.op, left_of(x, how)) for p, x, how in zip(pack.members, lhs, folds, strict=True)]
    if pack.array is None:
        right = [
            as_product.right(p.op, take(stacked(w, p.width), [group[0] for group in how.order]))
            for p, w, how in zip(pack.members, rhs, folds, strict=True)
        ]
        rhs = jax.vmap(layout)(concatenated([pad_to(w, (w.shape[0], k, n)) for w in right]))
    x = concatenated([pad_to(x, (x.shape[0], m, k)) for x in left])
    out = superkernel(pack, x[:, None], rhs)[:, 0]
    results: list[LaneValue] = []
    start = 0
    for p, how in zip(pack.members, folds, strict=True):
        count = how.groups * p.op.batch
        own = out[start : start + count, : how.per_group * p.op.m, : p.op.n]
        start += count
        whole = as_product.result(p.op, own, how.groups, how.per_group)
        results += unfolded(whole, [p], [how])
    return results
