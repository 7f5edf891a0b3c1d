"""A pack, or those of one launch: the members' operands brought together, one superkernel, and each member's result.

L lanes of a member; G problems with a right operand of their own, R lanes on each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from coalesce import jaxpr as J
from coalesce.bundle import epilogue_reads, folds_of, Pack
from coalesce.family import Family
from coalesce.heavy import HeavyOp
from coalesce.kernels import as_product, chained, FUSING, horizontal, KERNELS, mosaic_gemm
from coalesce.kernels.epilogue import COLUMN, Epilogue, on_tile, WHOLE
from coalesce.kernels.indexed_gemm import product_of
from coalesce.lanes import Banked, join, Joint, LaneValue, masked, plain, Shared, Stacked, stacked, take
from coalesce.layout import Layout, pad_to
from coalesce.member import Fold, Member
from coalesce.slab import Cut, Picked, whole
from coalesce.tf32 import nearest
from coalesce.unify import contracted


@dataclass(frozen=True)
class Operands:
    """What a pack reads, as LaneValues: its array or the right operands of all members, and what its epilogue reads.
    None is what the pack computes that it is chained to."""

    lhs: Sequence[Any]
    rhs: Any
    given: Sequence[Any] = ()


@dataclass(frozen=True)
class Call:
    """A pack's arguments as its kernel takes them, and each member's result from the kernel's [G,R,*out]."""

    lhs: Any  # [G,R,*lhs]
    rhs: Any  # [G,...] in the kernel's layout
    given: Sequence[Any]
    results: Callable[[Any], list[LaneValue]]


def lower_packs(
    packs: Sequence[Pack], families: Sequence[Family], operands: Sequence[Operands]
) -> list[list[LaneValue]]:
    """Each member's result, for each pack of one launch."""
    rules = {"": of_a_family, "equal": stacked_pack, "padded": stacked_pack, "product": product_pack}
    calls = [rules[pack.form](pack, folds_of(pack, families), own) for pack, own in zip(packs, operands, strict=True)]
    outs = superkernel(packs, [(call.lhs, call.rhs, *call.given) for call in calls])
    return [[] if pack.inner else call.results(out) for pack, call, out in zip(packs, calls, outs, strict=True)]


def superkernel(packs: Sequence[Pack], args: Sequence[Sequence[Any]]) -> list[Any]:
    """[G,R,*lhs] and [G,...] in the kernel's layout -> [G,R,*out], of each pack, as a call of the first one's name."""

    def run(args: Sequence[Sequence[Any]]) -> list[Any]:
        if len(packs) == 1:
            ((pack, own),) = zip(packs, args, strict=True)
            return [run_kernel(pack, *own)]
        if any(pack.chained for pack in packs):
            links = [
                chained.Link(pack.op, x, w, epilogue_of(pack), given, not pack.inner)
                for pack, (x, w, *given) in zip(packs, args, strict=True)
            ]
            assert packs[0].blocks, f"a chain without blocks: {packs[0].name}"
            return chained.run(links, packs[0].blocks)
        products = [
            product_of(pack.op, x, w, epilogue=epilogue_of(pack), operands=given, blocks=pack.blocks)
            for pack, (x, w, *given) in zip(packs, args, strict=True)
        ]
        return horizontal.run(products)

    run.__name__ = run.__qualname__ = packs[0].name
    with J.context_of(packs[0].members[0].eqn), jax.named_scope(packs[0].name):
        return jax.jit(run)(args)


def run_kernel(pack: Pack, x: Any, w: Any, *operands: Any) -> Any:
    if pack.kernel not in FUSING:
        return KERNELS[pack.kernel].run(pack.op, x, whole(w))
    how = {"epilogue": epilogue_of(pack), "operands": operands, "blocks": pack.blocks}
    if pack.rounded:
        return mosaic_gemm.run(pack.op, x, w, **how, rounded=True)
    return FUSING[pack.kernel].run(pack.op, x, w, **how)


def epilogue_of(pack: Pack) -> Epilogue | None:
    """The pack's epilogue on tiles: its steps are elementwise, and a broadcast is its operand's tile already."""
    if not pack.epilogue:
        return Epilogue(nearest, (), pack.op.out.dtype) if pack.rounds else None
    reads = epilogue_reads(pack)

    def apply(result: Any, *tiles: Any) -> Any:
        env = dict(zip([pack.members[0].eqn.outvars[0], *reads], [result, *tiles], strict=True))
        for step in pack.epilogue:
            args = [J.literal_value(a) if isinstance(a, J.Literal) else env[a] for a in step.eqn.invars]
            if step.eqn.primitive.name != "broadcast_in_dim":
                env[step.eqn.outvars[0]] = on_tile(step.eqn, args)
            elif isinstance(step.eqn.invars[0], J.Literal):
                env[step.eqn.outvars[0]] = jnp.full(jnp.shape(result), args[0], J.dtype(step.eqn.outvars[0]))
            else:
                env[step.eqn.outvars[0]] = args[0]
        last = env[pack.epilogue[-1].eqn.outvars[0]]
        return nearest(last) if pack.rounds else last

    kinds = tuple(WHOLE if J.shape(a) == pack.op.out.shape else COLUMN for a in reads)
    return Epilogue(apply, kinds, J.dtype(pack.epilogue[-1].eqn.outvars[0]))


# ---- one family: lanes share operands as they are ------------------------------------------------------------------


def of_a_family(pack: Pack, folds: Sequence[Fold], own: Operands) -> Call:
    layout, rhs = KERNELS[pack.kernel].layout(pack.op), own.rhs
    left = [left_of(value, how) for value, how in zip(own.lhs, folds, strict=True)]
    if pack.array is None:
        rhs = concatenated([right_of(value, layout) for value in rhs])
    shapes = [J.shape(atom) for atom in epilogue_reads(pack)]
    operands = [
        left_of(value, folds[0]) if shape == pack.op.out.shape else column_of(value, prod(shape), folds[0], pack.op)
        for value, shape in zip(own.given, shapes, strict=True)
    ]
    return Call(concatenated(left), rhs, operands, partial(unfolded, members=pack.members, folds=folds))


def left_of(value: LaneValue | None, how: Fold) -> Any:
    """The left operand as [G, R, ...]."""
    if value is None:
        return None
    value = plain(value)
    if isinstance(value, Shared):
        return jnp.broadcast_to(value.value, (how.groups, how.per_group, *jnp.shape(value.value)))
    x = take(value.value, [i for group in how.order for i in group])
    return x.reshape(how.groups, how.per_group, *x.shape[1:])


def column_of(value: LaneValue | None, size: int, how: Fold, op: HeavyOp) -> Any:
    """A vector over a result's columns, or a number for all of them, as [G, R, N]; a vector out of a bank as it lies,
    if problem g reads row g of it."""
    if size == op.n and isinstance(value, Banked) and isinstance(value.array, Cut | Picked):
        in_order = [value.rows[group[0]] for group in how.order] == list(range(how.groups))
        if in_order and how.per_group == 1 and op.batch == 1:
            return as_vectors(value.array, op.n)
    x = left_of(value, how)
    return jnp.broadcast_to(x.reshape(*x.shape[:2], -1), (*x.shape[:2], op.n))


def as_vectors(array: Any, n: int) -> Any:
    """A cut, or picked rows, of which each holds `n` elements: as vectors."""
    if isinstance(array, Picked) and not isinstance(array.array, Cut):
        return Picked(array.array.reshape(-1, n), array.slots)
    return array


def right_of(value: LaneValue, layout: Layout) -> Any:
    """A right operand that is no weight, as [G, ...] in the kernel's layout."""
    value = plain(value)
    x = jnp.asarray(value.value)[None] if isinstance(value, Shared) else value.value  # a literal is a number
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


def stacked_pack(pack: Pack, folds: Sequence[Fold], own: Operands) -> Call:
    (how,), op, lanes, rhs = folds, pack.op, [m.width for m in pack.members], own.rhs
    left_dims, right_dims = contracted(op)
    x = take(masked(join(own.lhs, lanes, op.lhs.shape), left_dims).value, [i for group in how.order for i in group])
    if pack.array is None:
        w = masked(join(rhs, lanes, op.rhs.shape), right_dims).value
        rhs = jax.vmap(KERNELS[pack.kernel].layout(op))(take(w, [group[0] for group in how.order]))

    def results(out: Any) -> list[LaneValue]:
        flat = take(out.reshape(how.groups * how.per_group, *op.out.shape), how.place)
        return list(Joint(flat, tuple(lanes), tuple(tuple(m.op.out.shape) for m in pack.members)).parts())

    return Call(x.reshape(how.groups, how.per_group, *op.lhs.shape), rhs, (), results)


# ---- several members with nothing but arithmetic in common: plain matrix products ------------------------------------


def product_pack(pack: Pack, folds: Sequence[Fold], own: Operands) -> Call:
    layout, (m, k), (_, n) = KERNELS[pack.kernel].layout(pack.op), pack.op.lhs.shape, pack.op.rhs.shape
    left = [as_product.left(p.op, left_of(x, how)) for p, x, how in zip(pack.members, own.lhs, folds, strict=True)]
    rhs = own.rhs
    if pack.array is None:
        right = [
            as_product.right(p.op, take(stacked(w, p.width), [group[0] for group in how.order]))
            for p, w, how in zip(pack.members, rhs, folds, strict=True)
        ]
        rhs = jax.vmap(layout)(concatenated([pad_to(w, (w.shape[0], k, n)) for w in right]))
    x = concatenated([pad_to(x, (x.shape[0], m, k)) for x in left])

    def results(out: Any) -> list[LaneValue]:
        found: list[LaneValue] = []
        start = 0
        for p, how in zip(pack.members, folds, strict=True):
            count = how.groups * p.op.batch
            part = out[start : start + count, 0, : how.per_group * p.op.m, : p.op.n]
            start += count
            whole = as_product.result(p.op, part, how.groups, how.per_group)
            found += unfolded(whole, [p], [how])
        return found

    return Call(x[:, None], rhs, (), results)
