"""Products of every n-th position of an image, such as a ResNet's shortcuts: a kernel that reads windows reads these
where they lie, and nobody copies them out first.

    %2 = slice %1 [strides=(1,2,2,1)]; %3 = dot_general %2 %w        as a 1x1 convolution of %1 in steps of 2
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from jax import lax

from coalesce import jaxpr as J
from coalesce.bundle import Bundle, items, Pack, Step
from coalesce.heavy import heavy_op, HeavyOp
from coalesce.kernels import mosaic_gemm
from coalesce.kernels.mosaic_tile import tile_of

KERNELS = ("indexed_gemm", "mosaic_gemm")  # that read windows of a stride, in the blocks of a product without

Slices = dict[tuple[int, Any], J.Eqn]  # what makes a family's variable


def slices_in(bundle: Bundle) -> Slices:
    steps = (item for item in items(bundle.schedule) if isinstance(item, Step) and not item.each)
    return {(s.family, s.eqn.outvars[0]): s.eqn for s in steps if s.eqn.primitive.name == "slice"}


def in_place(pack: Pack, slices: Slices) -> tuple[Pack, J.Atom] | None:
    """The pack that reads from a whole image what it would read of a slice, and that image."""
    if pack.kernel not in KERNELS or pack.form or len(pack.members) != 1:
        return None
    (member,) = pack.members
    eqn = slices.get((member.family, member.eqn.invars[0]))
    op = convolution(pack.op, eqn) if eqn else None
    if not eqn or not op or (pack.kernel == "mosaic_gemm" and not by_tma(op, pack)):
        return None
    return replace(pack, op=op), eqn.invars[0]


def by_tma(op: HeavyOp, pack: Pack) -> bool:
    """Whether mosaic_gemm runs it, in as many tiles of the same size: positions of an image, which a product's are not,
    may need more."""
    if not mosaic_gemm.supports(op) or pack.blocks is None:
        return mosaic_gemm.supports(op)
    tile, own = tile_of(op, pack.blocks), tile_of(pack.op, pack.blocks)
    return tile is not None and own is not None and tile.count <= own.count


def convolution(op: HeavyOp, eqn: J.Eqn) -> HeavyOp | None:
    """A product of a strided slice, as a convolution of what is sliced; None if it is none."""
    image, strides = J.aval_struct(eqn.invars[0].aval), eqn.params["strides"]
    channels = image.shape[-1]
    if op.kind != "dot" or op.batch > 1 or len(op.rhs.shape) != 2 or len(image.shape) < 3 or not strides:
        return None
    ((contracted, _), _) = op.params["dimension_numbers"]
    whole = strides[0] == strides[-1] == 1 and op.k == channels and contracted == (len(image.shape) - 1,)
    if not whole or set(strides) == {1} or any(eqn.params["start_indices"]):
        return None
    if [-(-size // step) for size, step in zip(image.shape, strides, strict=True)] != list(op.lhs.shape):
        return None
    rank = len(image.shape) - 2
    spatial = tuple(range(1, rank + 1))
    data = (0, rank + 1, *spatial)
    numbers = lax.ConvDimensionNumbers(data, (rank + 1, rank, *range(rank)), data)
    weights = jax.ShapeDtypeStruct((*(1 for _ in spatial), channels, op.n), op.rhs.dtype)

    def call(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(
            x,
            w,
            strides[1:-1],
            "VALID",
            dimension_numbers=numbers,
            precision=op.precision,
            preferred_element_type=op.params["preferred_element_type"],
        )

    (made,) = J.walk(jax.make_jaxpr(call)(image, weights))
    return replace(heavy_op(made), context=op.context)
