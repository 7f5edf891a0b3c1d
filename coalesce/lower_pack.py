"""A pack, or those of one launch: the members' operands brought together, one superkernel, and each member's result.

L lanes of a member; G problems with a right operand of their own, R lanes on each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from coalesce import jaxpr as J
from coalesce.bundle import folds_of, Pack
from coalesce.family import Family
from coalesce.kernels import as_product, chained, FUSING, horizontal, KERNELS, mosaic_gemm
from coalesce.kernels.indexed_gemm import product_of
from coalesce.lanes import (
    join,
    Joint,
    LaneValue,
    masked,
    plain,
    Shared,
    Stacked,
    stacked,
    take,
)
from coalesce.layout import Layout, pad_to
from coalesce.lower_epilogue import by_place, epilogue_of, given_to
from coalesce.member import Fold, Member
from coalesce.slab import whole
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
    """Each member's result, or all that an epilogue leaves, for each pack of one launch."""
    rules = {"": of_a_family, "equal": stacked_pack, "padded": stacked_pack, "product": product_pack}
    calls = [rules[pack.form](pack, folds_of(pack, families), own) for pack, own in zip(packs, operands, strict=True)]
    outs = superkernel(packs, [(call.lhs, call.rhs, *call.given) for call in calls])
    return [
        [] if pack.inner else [value for result in own for value in call.results(result)]
        for pack, call, own in zip(packs, calls, outs, strict=True)
    ]


def superkernel(packs: Sequence[Pack], args: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """[G,R,*lhs] and [G,...] in the kernel's layout -> [G,R,*out], or what its epilogue leaves, of each pack, as a call
    of the first one's name."""

    def run(args: Sequence[Sequence[Any]]) -> list[list[Any]]:
        if len(packs) == 1:
            ((pack, own),) = zip(packs, args, strict=True)
            found = run_kernel(pack, *own)
            return [found if isinstance(found, list) else [found]]
        if any(pack.chained for pack in packs):
            links = [
                chained.Link(pack.op, x, w, epilogue_of(pack), given, not pack.inner)
                for pack, (x, w, *given) in zip(packs, args, strict=True)
            ]
            assert packs[0].blocks, f"a chain without blocks: {packs[0].name}"
            return [[y] for y in chained.run(links, packs[0].blocks)]
        products = [
            product_of(pack.op, x, w, epilogue=epilogue_of(pack), operands=given, blocks=pack.blocks)
            for pack, (x, w, *given) in zip(packs, args, strict=True)
        ]
        return [[y] for y in horizontal.run(products)]

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


# ---- one family: lanes share operands as they are ------------------------------------------------------------------


def of_a_family(pack: Pack, folds: Sequence[Fold], own: Operands) -> Call:
    layout, rhs = KERNELS[pack.kernel].layout(pack.op), own.rhs
    left = [by_place(value, how) for value, how in zip(own.lhs, folds, strict=True)]
    if pack.array is None:
        rhs = concatenated([right_of(value, layout) for value in rhs])
    operands = given_to(pack, folds[0], own.given) if pack.epilogue else ()
    return Call(concatenated(left), rhs, operands, partial(unfolded, members=pack.members, folds=folds))


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
    left = [as_product.left(p.op, by_place(x, how)) for p, x, how in zip(pack.members, own.lhs, folds, strict=True)]
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
