"""Dots and convolutions of stride 1 in 16 bits as one Mosaic GPU kernel: wgmma on what TMA has fetched, on an H100.

    grid (images, tiles of one, parts of the columns)
    a program: one tile, see coalesce.kernels.mosaic_tile and mosaic_program

A left block is fetched once for all taps of a column of the window, and TMA finds its rows and fills in zeros beyond
the borders. What that wins, and what it does not, is in docs/performance.md.

It is how `indexed_gemm`, whose weights it reads, runs an op on an NVIDIA GPU with blocks that say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from coalesce import jaxpr as J
from coalesce.heavy import HeavyOp
from coalesce.kernels.epilogue import Epilogue, TILEWISE, WHOLE
from coalesce.kernels.mosaic import call
from coalesce.kernels.mosaic_program import IMAGE, PART, Program, Source, TILE
from coalesce.kernels.mosaic_tile import Tile, VECTORS
from coalesce.kernels.tiles import operands_of
from coalesce.kernels.windows import windows_of
from coalesce.slab import Cut, Picked

HALVES = ("bfloat16", "float16")
ROW = 64  # their number in a swizzled row
TOGETHER = 8  # rows of a swizzled tile, which what TMA reads has a whole number of
# Of what an epilogue may have, what the backend lowers on a tile, in all versions that are supported.
LOWERED = (TILEWISE - {"cos", "integer_pow", "log1p", "sin", "sqrt"}) | {"broadcast_in_dim", "jit", "pjit"}


def supports(op: HeavyOp) -> bool:
    """Of what indexed_gemm supports."""
    dtypes = {str(x.dtype) for x in (op.lhs, op.rhs, op.out)}
    if len(dtypes) > 1 or not dtypes <= set(HALVES) or op.batch > 1 or op.empty:
        return False
    windows = windows_of(op)
    if windows.k != op.k or windows.channels % ROW or op.n % ROW:
        return False
    steps = {*windows.strides, *windows.dilation}
    return op.kind == "dot" or (len(windows.taps) == 2 and steps == {1} and min(windows.before) >= 0)


def reads(op: HeavyOp, rhs: Any) -> bool:
    """Whether it can read right operands where they lie: a cut, if it is whole rows of N, and its slab whole tiles."""
    cut = rhs.array if isinstance(rhs, Picked) else rhs
    return not isinstance(cut, Cut) or (cut.start % op.n == 0 and cut.slab.shape[1] % (TOGETHER * op.n) == 0)


def run(
    tile: Tile,
    lhs: Any,
    rhs: Any,
    epilogue: Epilogue | None = None,
    operands: Sequence[Any] = (),
    interpreted: bool = False,
) -> Any:
    """lhs [G,R,*lhs] x rhs [G,K,N] -> [G,R,*out], as `indexed_gemm.run` for the tile's op and blocks."""
    op, (groups, lanes) = tile.op, lhs.shape[:2]
    if epilogue and not takes(epilogue, operands, tile):
        return outside(op, run(tile, lhs, rhs, interpreted=interpreted), epilogue, operands)
    x = lhs.reshape(-1, *tile.size, tile.channels)
    images = len(x)
    kinds = epilogue.kinds if epilogue else ()
    out = jax.ShapeDtypeStruct((images, *tile.out, op.n), epilogue.dtype if epilogue else op.out.dtype)
    values = [rhs, *(as_images(y, out.shape, kind) for y, kind in zip(operands, kinds, strict=True))]
    given = operands_of(values)
    weights, *others = given.arrays
    first = given.starts[0]
    if first is not None:
        weights = weights.reshape(weights.shape[0], -1, op.n)
    places = zip(given.starts, values, given.picked, strict=True)
    sources = [Source(start or 0, images // rows_of(y), picked) for start, y, picked in places]
    sources[0] = Source((first or 0) // op.n, images // groups, given.picked[0])
    program = Program(tile, tuple(sources), epilogue, jnp.dtype(out.dtype), interpreted)
    if interpreted:
        x = jnp.pad(x, ((0, 0), *((n, 0) for n in tile.before), (0, 0)))
    args = (*given.slots, x, weights, *others)
    cut = len(given.slots)

    def kernel(*refs: Any, **memory: Any) -> None:
        program.run(refs[:cut], refs[cut], refs[cut + 1 : -1], refs[-1], memory)

    grid = {IMAGE: images, TILE: tile.count, PART: op.n // tile.blocks.n}
    vectors = [y.dtype for y, kind in zip(others, kinds, strict=True) if kind != WHOLE]
    name = f"{op.kind}_{images}x{op.m}x{op.n}x{op.k}"
    y = call(kernel, grid, tile.groups + 1, out, args, program.memory(vectors), name=name, interpreted=interpreted)
    return y.reshape(groups, lanes, *op.out.shape)


def takes(epilogue: Epilogue, operands: Sequence[Any], tile: Tile) -> bool:
    """Whether the kernel can run it: with a result of 16 bits, and one operand of its shape at most."""
    dtypes = [dtype_of(y) for y in operands]
    wholes = [dtype for dtype, kind in zip(dtypes, epilogue.kinds, strict=True) if kind == WHOLE]
    vectors = [dtype for dtype, kind in zip(dtypes, epilogue.kinds, strict=True) if kind != WHOLE]
    if sum(dtype.itemsize for dtype in vectors) * tile.blocks.n > VECTORS:
        return False
    if str(epilogue.dtype) not in HALVES or any(dtype != epilogue.dtype for dtype in wholes) or len(wholes) > 1:
        return False
    if not {str(dtype) for dtype in dtypes} <= {*HALVES, "float32"}:
        return False
    structs = [jax.ShapeDtypeStruct((64, ROW), dtype) for dtype in (tile.op.out.dtype, *dtypes)]
    return {eqn.primitive.name for eqn in J.walk(jax.make_jaxpr(epilogue.apply)(*structs))} <= LOWERED


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
