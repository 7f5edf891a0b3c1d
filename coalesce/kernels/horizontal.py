"""Products of different shapes in one launch: its programs are divided among them, and nothing is padded or copied.

    programs  0 .. 5 | 6 .. 9 | 10 .. 33          a program finds its product from its id, and computes one tile of it
    product      0   |   1    |    2

Each product has its own sizes, blocks, epilogue and arrays; warps and stages are the launch's. Small products, which
alone leave most of a device idle, share it so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from jax.experimental import pallas as pl

from coalesce.kernels.indexed_gemm import Product
from coalesce.kernels.triton import div, launch, rem

MOST = 8  # products of a launch: each adds its code to the kernel, and its arrays to the kernel's arguments


def run(products: Sequence[Product]) -> list[Any]:
    """The result of each, as `indexed_gemm.run` gives it."""
    order = sorted(range(len(products)), key=lambda i: -tile_work(products[i]))  # so that the last to end are short
    parts = [products[i] for i in order]
    ends = list(accumulate(part.tiled.count * part.problems for part in parts))
    cuts = list(accumulate((len(part.args) for part in parts), initial=0))

    def kernel(*refs: Any) -> None:
        program = pl.program_id(0)
        for i, (part, end) in enumerate(zip(parts, ends, strict=True)):
            count = part.tiled.count
            at = program - (end - count * part.problems)

            @pl.when((at >= 0) & (program < end))
            def _(part: Product = part, i: int = i, at: Any = at, count: int = count) -> None:
                part.write(rem(at, count), div(at, count), refs[cuts[i] : cuts[i + 1]], [refs[cuts[-1] + i]])

    blocks = [part.tiled.blocks for part in parts]
    results = launch(
        kernel,
        (ends[-1],),
        [out for part in parts for out in part.outs],  # one of each
        [arg for part in parts for arg in part.args],
        name="_".join(part.name for part in parts),
        warps=max(block.warps for block in blocks),  # enough registers for each
        stages=min(block.stages for block in blocks),  # and enough shared memory
    )
    found = {i: part.result(y) for i, part, y in zip(order, parts, results, strict=True)}
    return [found[i] for i in range(len(products))]


def tile_work(product: Product) -> int:
    blocks = product.tiled.blocks
    return blocks.m * blocks.n * blocks.k * product.tiled.steps
