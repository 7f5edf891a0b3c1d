"""Dots and convolutions as one Mosaic GPU kernel: wgmma on what TMA has fetched, on an H100.

    grid (images, tiles of one, parts of the columns)
    a program: one tile, see coalesce.kernels.mosaic_tile and mosaic_program

A left block is fetched once for all taps of a column of the window, and TMA finds its rows and fills in zeros beyond
the borders. What that wins, and what it does not, is in docs/performance.md.

It reads the weights of `indexed_gemm`, which runs the op on any other device.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels import indexed_gemm
from coalesce.kernels.epilogue import Epilogue, WHOLE
from coalesce.kernels.mosaic import call, lowers, ROW_BYTES, TOGETHER
from coalesce.kernels.mosaic_program import IMAGE, PART, Program, Source, TILE
from coalesce.kernels.mosaic_tile import Tile, tile_of, VECTORS
from coalesce.kernels.operands import operands_of
from coalesce.kernels.platforms import by_platform
from coalesce.kernels.tiles import precision_of
from coalesce.kernels.windows import windows_of
from coalesce.layout import Layout
from coalesce.slab import Cut, Picked
from coalesce.structure import canonical
from coalesce.tf32 import multiplies, near

FLOATS = ("float32", "bfloat16", "float16")


def supports(op: HeavyOp) -> bool:
    dtypes = {str(x.dtype) for x in (op.lhs, op.rhs, op.out)}
    if len(dtypes) > 1 or op.batch > 1 or not indexed_gemm.supports(op):
        return False
    row = ROW_BYTES // op.lhs.dtype.itemsize
    precision = precision_of(op)
    if op.lhs.dtype.itemsize == 4 and precision == lax.Precision.HIGHEST:  # wgmma takes no more than TF32
        return False
    windows = windows_of(op)
    if windows.k != op.k or windows.channels % row or op.n % row:
        return False
    if op.kind == "conv" and (len(windows.taps) != 2 or set(windows.dilation) != {1} or min(windows.before) < 0):
        return False
    if any(size % stride for size, stride in zip(windows.size, windows.strides, strict=True)):
        return False
    return by_rule(op) is not None


def layout(op: HeavyOp) -> Layout:
    """That of `indexed_gemm`. Of 32 bits wgmma cuts off what TF32 has no place for, so weights lie rounded."""
    flat = indexed_gemm.layout(op)
    return flat.rounded() if multiplies(op) else flat


def granule(shape: Sequence[int], dtype: Any) -> int:
    """What an array in a slab starts at a multiple of, and the slab ends at one, so that the kernel may read it there:
    the rows that are copied together. 1 if the kernel cannot."""
    itemsize = jnp.dtype(dtype).itemsize
    if str(jnp.dtype(dtype)) not in FLOATS or len(shape) != 2 or not shape[1] or shape[1] * itemsize % ROW_BYTES:
        return 1
    return shape[1] if itemsize == 4 else TOGETHER * shape[1]


def run(
    op: HeavyOp,
    lhs: Any,
    rhs: Any,
    epilogue: Epilogue | None = None,
    operands: Sequence[Any] = (),
    blocks: Blocks | None = None,
    rounded: bool = False,
) -> Any:
    """As `indexed_gemm.run`. `rounded` says that an operand of 32 bits has no more than TF32 has, as the other one
    does; if not, XLA rounds it before."""
    tile = (tile_of(op, blocks) if blocks else None) or by_rule(op)
    assert tile, f"an op that has no tile: {op}"
    return by_platform(
        lhs,
        rhs,
        tuple(operands),
        cuda=lambda x, w, given: fetched(tile, near(x) if multiplies(op) and not rounded else x, w, epilogue, given),
        default=lambda x, w, given: indexed_gemm.run(op, x, w, epilogue=epilogue, operands=given),
    )


def by_rule(op: HeavyOp) -> Tile | None:
    """Until tuned: the widest that fits."""
    tiles = (tile_of(op, Blocks(64, n, ROW_BYTES // op.lhs.dtype.itemsize, 4, 6)) for n in (128, 64))
    return next((tile for tile in tiles if tile), None)


def fetched(
    tile: Tile,
    lhs: Any,
    rhs: Any,
    epilogue: Epilogue | None = None,
    operands: Sequence[Any] = (),
    interpreted: bool = False,
) -> Any:
    """`run` in tiles such as this one, by TMA."""
    op, (groups, lanes) = tile.op, lhs.shape[:2]
    work = on_tiles(epilogue, operands, tile) if epilogue else None
    if epilogue and work is None:
        return outside(op, fetched(tile, lhs, rhs, interpreted=interpreted), epilogue, operands)
    x = lhs.reshape(-1, *tile.size, tile.channels)
    images = len(x)
    kinds = epilogue.kinds if epilogue else ()
    out = jax.ShapeDtypeStruct((images, *tile.out, op.n), epilogue.dtype if epilogue else op.out.dtype)
    values = [rhs, *(as_images(y, out.shape, kind) for y, kind in zip(operands, kinds, strict=True))]
    given = operands_of(values)
    weights, *others = given.arrays
    begin = [start or 0 for start in given.starts]
    if given.starts[0] is not None:
        whole = granule((op.k, tile.length), op.rhs.dtype)
        assert begin[0] % whole == 0 == weights.shape[1] % whole, f"a slab that TMA cannot read: {begin[0]}"
        weights, begin[0] = weights.reshape(weights.shape[0], -1, tile.length), begin[0] // tile.length
    # An arithmetic progression XLA would compute, by a kernel of its own: nobody reads the last number.
    starts = () if set(given.starts) == {None} else (jnp.asarray([*begin, -1], jnp.int32),)
    sources = [
        Source(images // rows_of(y), picked, None if start is None else i)
        for i, (y, picked, start) in enumerate(zip(values, given.picked, given.starts, strict=True))
    ]
    program = Program(tile, tuple(sources), epilogue, work, jnp.dtype(out.dtype), interpreted)
    y = launched(program, given.slots, starts, x, (weights, *others))
    return y.reshape(groups, lanes, *op.out.shape)


@partial(jax.jit, static_argnums=0)  # programs that are equal are one: compiling one takes a second
def launched(program: Program, slots: Sequence[Any], starts: Sequence[Any], x: Any, arrays: Sequence[Any]) -> Any:
    tile, images = program.tile, len(x)
    op = tile.op
    out = jax.ShapeDtypeStruct((images, *tile.out, op.n), program.dtype)
    if program.interpreted:
        border = [(n * stride, 0) for n, stride in zip(tile.outside, tile.strides, strict=True)]
        x = jnp.pad(x, ((0, 0), *border, (0, 0)))
    (h, w), (down, across) = x.shape[1:3], tile.strides
    x = x.reshape(images, h // down, down, w // across, across, tile.channels)

    def kernel(*refs: Any, **memory: Any) -> None:
        rest = iter(refs)
        picks, places = (next(rest) if given else None for given in (slots, starts))
        x, *arrays, y = rest
        program.run(picks, places, x, arrays, y, memory)

    grid = {IMAGE: images, TILE: tile.count, PART: op.n // tile.blocks.n}
    vectors = [y.dtype for y, kind in zip(arrays[1:], program.kinds, strict=True) if kind != WHOLE]
    return call(
        kernel,
        grid,
        tile.groups + 1,
        out,
        (*slots, *starts, x, *arrays),
        program.memory(vectors),
        name=f"{op.kind}_{images}x{op.m}x{op.n}x{op.k}",
        interpreted=program.interpreted,
    )


def on_tiles(epilogue: Epilogue, operands: Sequence[Any], tile: Tile) -> Hashable | None:
    """What it computes, equal for equal work; None if the kernel cannot run it: then it has a result of another width
    than the op's, or several operands of its shape, or vectors or operations for which there is no room or no code."""
    dtypes = [dtype_of(y) for y in operands]
    wholes = [dtype for dtype, kind in zip(dtypes, epilogue.kinds, strict=True) if kind == WHOLE]
    vectors = [dtype for dtype, kind in zip(dtypes, epilogue.kinds, strict=True) if kind != WHOLE]
    if sum(dtype.itemsize for dtype in vectors) * tile.blocks.n > VECTORS:
        return None
    if not {str(dtype) for dtype in (epilogue.dtype, *dtypes)} <= set(FLOATS):
        return None
    same_width = jnp.dtype(epilogue.dtype).itemsize == tile.op.out.dtype.itemsize
    if not same_width or any(dtype != epilogue.dtype for dtype in wholes) or len(wholes) > 1:
        return None
    structs = [jax.ShapeDtypeStruct((64, tile.row), dtype) for dtype in (tile.op.out.dtype, *dtypes)]
    jaxpr = jax.make_jaxpr(epilogue.apply)(*structs)
    return canonical(jaxpr, positional=True).key if lowers(jaxpr) else None


def dtype_of(y: Any) -> Any:
    y = y.array if isinstance(y, Picked) else y
    return jnp.dtype(y.slab.dtype if isinstance(y, Cut) else y.dtype)


def rows_of(y: Any) -> int:
    """How many rows a launch reads of an operand."""
    if isinstance(y, Picked):
        return len(y.slots)
    return (y.slab if isinstance(y, Cut) else y).shape[0]


def as_images(y: Any, out: tuple[int, ...], kind: str) -> Any:
    """An epilogue's operand: like the result, or with a row for each group or lane."""
    if kind == WHOLE:
        return y.reshape(out)
    return y if isinstance(y, Cut | Picked) else y.reshape(-1, out[-1])


def outside(op: HeavyOp, y: Any, epilogue: Epilogue, operands: Sequence[Any]) -> Any:
    """The epilogue as XLA runs it."""
    groups, lanes = y.shape[:2]
    shape = (groups, lanes, op.m, op.n)

    def whole(z: Any, kind: str) -> Any:
        z = z.read() if isinstance(z, Cut | Picked) else z
        return z.reshape(shape) if kind == WHOLE else jnp.broadcast_to(z.reshape(groups, -1, 1, op.n), shape)

    given = [whole(z, kind) for z, kind in zip(operands, epilogue.kinds, strict=True)]
    return epilogue.apply(y.reshape(shape), *given).reshape(y.shape)
