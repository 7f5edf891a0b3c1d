"""Tiles of mosaic_gemm: which there are, and which are worth measuring."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels.mosaic_tile import tile_of
from coalesce.tuning.candidates import candidates
from tests.mosaic_ops import conv, dot


def place(op: HeavyOp, *blocks: int, turned: bool = False, over: bool = False) -> tuple[int, ...] | None:
    tile = tile_of(op, Blocks(*blocks, turned=turned, over=over))
    return (tile.tall, tile.wide, tile.count, tile.left_stages, tile.right_stages) if tile else None


def test_tiles_cover_an_image_with_few_and_wide_ones():
    assert place(conv(28, 28, 128, 128), 128, 128, 64, 8, 6) == (4, 32, 7, 3, 6)
    assert place(conv(14, 14, 256, 256), 64, 128, 64, 4, 6) == (4, 16, 4, 3, 6)
    assert place(conv(56, 56, 64, 64), 64, 64, 64, 4, 4) == (8, 8, 49, 3, 4)
    assert place(dot(196, 256, 1024), 64, 128, 64, 4, 6) == (1, 64, 4, 4, 4)  # no more stages than steps


def test_tiles_fit():
    op = dot(784, 1024, 256)
    assert place(op, 128, 128, 64, 8, 12) == (1, 128, 7, 5, 5)  # no more stages than shared memory holds
    assert place(op, 128, 128, 64, 4, 2) == (1, 128, 7, 2, 2)
    assert place(op, 128, 256, 64, 4, 2) is None  # sums of 256 registers
    assert place(op, 256, 128, 64, 16, 2) == (1, 256, 4, 2, 2)
    assert place(dot(784, 1024, 192), 256, 192, 64, 16, 2) is None  # 96, which is all that a thread has beside four
    assert place(op, 64, 128, 64, 2, 2) is None  # half a warpgroup
    assert place(op, 64, 128, 64, 8, 2) is None  # half of what a warpgroup multiplies
    assert place(dot(784, 192, 256), 64, 128, 128, 4, 2) is None  # blocks that do not divide K
    assert place(dot(784, 192, 192), 64, 128, 64, 4, 2) is None  # or N


def test_one_place_is_enough_for_one_block_alone():
    """It is freed when the next block has been multiplied, which would never come."""
    assert place(dot(784, 64, 256), 64, 128, 64, 4, 1) == (1, 64, 13, 1, 1)
    assert place(dot(784, 128, 256), 64, 128, 64, 4, 1) is None
    assert place(conv(14, 14, 64, 64), 64, 64, 64, 4, 1) is None


def test_turned_tiles_fit():
    op = dot(197, 3072, 768)
    assert place(op, 200, 192, 64, 12, 3, turned=True) == (1, 200, 1, 3, 3)
    assert place(op, 104, 128, 64, 8, 4, turned=True) == (1, 104, 2, 4, 4)
    assert place(op, 200, 128, 64, 12, 2, turned=True) is None  # 64 columns for each of three warpgroups
    assert place(op, 100, 128, 64, 8, 2, turned=True) is None  # tensor cores take 8 positions at a time
    assert place(op, 200, 256, 64, 8, 2, turned=True) is None  # sums of 200 registers
    assert place(op, 208, 192, 64, 12, 2, turned=True) is None  # of 104 of 128, and ptxas wants 28 for the rest
    assert place(dot(197, 3072, 768, jnp.float32), 200, 64, 32, 4, 12, turned=True) == (1, 200, 1, 5, 5)
    assert place(conv(14, 14, 256, 256), 112, 64, 64, 4, 4, turned=True) == (7, 16, 2, 3, 4)
    assert all(blocks.turned is False for _, blocks in candidates(dot(128, 768, 768), 8, 1, "gpu", True) if blocks)
    found = [blocks for _, blocks in candidates(op, 8, 1, "gpu", True) if blocks and blocks.turned]
    assert {blocks.m for blocks in found} == {72, 104, 200} and len(found) > 20


def test_a_result_over_what_was_multiplied_leaves_room():
    """Of 200 x 192 in 32 bits it would take 150 KB, and a step 49."""
    op = dot(197, 768, 3072, jnp.float32)
    assert place(op, 200, 192, 32, 12, 4, turned=True) is None
    assert place(op, 200, 192, 32, 12, 6, turned=True, over=True) == (1, 200, 1, 4, 4)
    assert place(op, 256, 256, 32, 16, 2, over=True) is None  # larger than all that there is
    found = [blocks for _, blocks in candidates(op, 8, 1, "gpu", True) if blocks and blocks.over]
    assert Blocks(200, 192, 32, 12, 4, turned=True, over=True) in found
    assert {blocks.warps for blocks in found if blocks.stages == 2 and blocks.k == 32} == {4}  # two on a core


@pytest.mark.parametrize("op", [conv(14, 14, 256, 256), dot(49, 512, 2048)], ids=["conv", "dot"])
def test_candidates_fit(op):
    found = [blocks for kernel, blocks in candidates(op, 16, 1, "gpu", True) if blocks and kernel == "mosaic_gemm"]
    assert len(found) > 4 and len(set(found)) == len(found)
    assert all((tile := tile_of(op, blocks)) and tile.right_stages == blocks.stages for blocks in found)
