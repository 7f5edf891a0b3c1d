"""Products that may run in one launch, as the tuning database knows them: see coalesce/kernels/chained.py."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import product
from typing import NamedTuple

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels.indexed_gemm import tile
from coalesce.kernels.mosaic import SHARED_BYTES
from coalesce.tuning.candidates import Candidate
from coalesce.tuning.entry import op_text

CHAINED, APART = "chained", "apart"  # what an entry of a chain names, rather than a kernel


class Chain(NamedTuple):
    feed: HeavyOp | None
    head: HeavyOp | None
    wide: HeavyOp
    narrow: HeavyOp | None

    def __str__(self) -> str:
        """What decides its work."""
        feed = f"{op_text(self.feed)} into " if self.feed else ""
        return feed + " then ".join(op_text(op) for op in self[1:] if op)

    @property
    def key(self) -> Hashable:
        return tuple(op and op.key for op in self)


def candidates(chain: Chain, rows: int) -> list[Candidate]:
    """What is worth measuring: the products by themselves, in the best kernels that are known, and chained ones."""
    return [(APART, None), *((CHAINED, blocks) for blocks in tiles(chain, rows))]


def has_whole_tiles(chain: Chain, blocks: Blocks) -> bool:
    """Whether the columns that a narrow product sums over are tiles of the wide one's, none of them in part."""
    return chain.narrow is None or chain.wide.n % blocks.n == 0


def tiles(chain: Chain, rows: int) -> Iterator[Blocks]:
    """Each warpgroup has 64 rows; fewer columns leave registers and room for more programs on a core."""
    _, _, wide, narrow = chain
    for (m, warps), n, k, stages in product(((64, 4), (128, 8)), (16, 32, 64, 128), (32, 64), (2, 3, 4)):
        fetched = (wide.k + m + (tile(narrow.n) if narrow else 0)) * n * wide.lhs.dtype.itemsize
        whole = wide.n % n == 0 and m <= max(64, tile(rows * wide.m))
        if whole and fetched * stages <= SHARED_BYTES and (n >= 32 or stages > 2):
            yield Blocks(m, n, k, warps, stages)
