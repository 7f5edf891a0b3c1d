"""indexed_gemm beyond what tests/test_kernels.py asks of every kernel: tiles, slots, and lowering for a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh

from coalesce.heavy import heavy_op, HeavyOp
from coalesce.kernels import indexed_gemm
from coalesce.kernels.indexed_gemm import Blocks, blocks_for
from coalesce.kernels.windows import windows_of
from coalesce.slab import Picked
from tests.alone import array
from tests.compare import assert_same
from tests.hlo import operations

Shape = tuple[int, ...]
SMALL = Blocks(16, 16, 16)


def conv(strides: Shape = (1, 1), padding: Any = "SAME", dilation: Shape = (1, 1), precision: Any = "highest") -> Any:
    return partial(
        lax.conv_general_dilated, window_strides=strides, padding=padding, rhs_dilation=dilation, precision=precision,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def op_of(call: Callable[..., Any], lhs: Shape, rhs: Shape, dtype: Any = jnp.float32) -> HeavyOp:
    (eqn,) = jax.make_jaxpr(call)(jax.ShapeDtypeStruct(lhs, dtype), jax.ShapeDtypeStruct(rhs, dtype)).jaxpr.eqns
    return heavy_op(eqn)


def run(op: HeavyOp, lhs: Any, rhs: Any, slots: Any = None, blocks: Blocks | None = None) -> Any:
    rhs = jax.vmap(indexed_gemm.layout(op))(rhs)
    rhs = rhs if slots is None else Picked(rhs, slots)
    return jax.jit(lambda x, w: indexed_gemm.run(op, x, w, blocks=blocks))(lhs, rhs)


def plain(call: Any, lhs: Any, rhs: Any) -> Any:
    return jnp.stack([jnp.stack([call(x, w) for x in xs]) for xs, w in zip(lhs, rhs, strict=True)])


DOT = partial(lax.dot, precision="highest")
HEADS = partial(lax.dot_general, dimension_numbers=(((2,), (1,)), ((0,), (0,))), precision="highest")
TILED = {
    "dot of three by three tiles": (DOT, (40, 33), (33, 47)),
    "heads": (HEADS, (3, 20, 18), (3, 18, 17)),
    "conv, taps by taps": (conv(), (1, 7, 7, 32), (3, 3, 32, 20)),
    "conv, taps with few channels": (conv((2, 2), [(3, 2), (2, 3)]), (1, 9, 8, 3), (7, 7, 3, 20)),
    "conv, taps with channels left over": (conv(dilation=(2, 1)), (2, 6, 5, 17), (3, 2, 17, 5)),
    "conv with a border left out": (conv((1, 2), [(-1, 2), (1, -2)]), (1, 8, 9, 16), (2, 3, 16, 4)),
}


@pytest.mark.parametrize(("call", "lhs", "rhs"), TILED.values(), ids=TILED)
def test_tiles(call, lhs, rhs):
    op, x, w = op_of(call, lhs, rhs), array(2, 2, *lhs), array(2, *rhs)
    assert_same(run(op, x, w, blocks=SMALL), plain(call, x, w))


@pytest.mark.parametrize(("call", "lhs", "rhs"), [TILED["heads"], TILED["conv, taps by taps"]], ids=["heads", "conv"])
def test_slots_say_which_rows_of_the_bank_are_read(call, lhs, rhs):
    """Two problems may read one row, and rows that nobody reads may hold anything."""
    op, x, bank, slots = op_of(call, lhs, rhs), array(3, 1, *lhs), array(5, *rhs), jnp.asarray([4, 1, 4])
    bank = bank.at[jnp.asarray([0, 2, 3])].set(jnp.nan)
    assert_same(run(op, x, bank, slots), plain(call, x, bank[slots]))


def test_what_pads_few_channels_reads_nothing():
    """Seven taps of three channels lie as eight of four: an infinite pixel is in the windows that cover it, and in no
    other."""
    call, lhs, rhs = TILED["conv, taps with few channels"]
    op, x, w = op_of(call, lhs, rhs), array(1, 1, *lhs), array(1, *rhs)
    assert windows_of(op).k == indexed_gemm.layout(op).of(rhs)[1] == 7 * 8 * 4
    x = x.at[0, 0, 0, 4, 5, 1].set(jnp.inf)
    got, want = run(op, x, w), plain(call, x, w)
    assert np.isfinite(want).any() and not np.isfinite(want).all()
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_allclose(got[np.isfinite(want)], want[np.isfinite(want)], rtol=1e-5, atol=1e-5)


# (strides, padding, image, window): in steps of two, windows begin at odd or even places, or before the image
TOGETHER = {
    "seven by seven": ((2, 2), [(3, 3), (3, 3)], (12, 10, 3), (7, 7)),
    "begins in the image": ((2, 2), [(0, 1), (0, 1)], (8, 8, 3), (3, 3)),
    "begins before it": ((1, 2), [(1, 1), (1, 0)], (6, 8, 3), (3, 3)),
    "taps are padded to a power of two": ((2, 2), [(2, 2), (2, 2)], (6, 8, 4), (5, 6)),
    "a border is left out": ((2, 2), [(0, 0), (-1, 0)], (8, 10, 3), (3, 3)),
}


@pytest.mark.parametrize(("strides", "padding", "image", "window"), TOGETHER.values(), ids=TOGETHER)
@pytest.mark.once
def test_neighbours_are_read_together(strides, padding, image, window):
    """Of 16 bits, in steps of two: a load takes two pixels."""
    call, lhs, rhs = conv(strides, padding), (2, *image), (*window, image[-1], 20)
    op = op_of(call, lhs, rhs, jnp.bfloat16)
    windows = windows_of(op)
    assert windows.channels == 8 and windows.strides[1] == 1 and windows.size[1] == image[1] // 2
    x, w = (array(2, 1, *lhs).astype(jnp.bfloat16), array(2, *rhs).astype(jnp.bfloat16))
    got = run(op, x, w, blocks=SMALL).astype(jnp.float32)
    want = plain(call, x.astype(jnp.float32), w.astype(jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2 * float(jnp.abs(want).max()))


NOT_TOGETHER = {
    "of 32 bits": (conv((2, 2)), (1, 8, 8, 3), jnp.float32),
    "in steps of one": (conv(), (1, 8, 8, 3), jnp.bfloat16),
    "in steps of four": (conv((4, 4)), (1, 8, 8, 3), jnp.bfloat16),
    "dilated": (conv((2, 2), dilation=(1, 2)), (1, 8, 8, 3), jnp.bfloat16),
    "with one left over": (conv((2, 2)), (1, 8, 7, 3), jnp.bfloat16),
}


@pytest.mark.parametrize(("call", "lhs", "dtype"), NOT_TOGETHER.values(), ids=NOT_TOGETHER)
def test_neighbours_that_are_read_one_by_one(call, lhs, dtype):
    windows = windows_of(op_of(call, lhs, (3, 3, 3, 20), dtype))
    assert (windows.channels, windows.in_a_row, windows.size) == (4, 4, lhs[1:3])


def test_blocks_are_powers_of_two_that_fill_the_device():
    image, words, row = (op_of(*TILED[name]) for name in ("conv, taps by taps", "heads", "dot of three by three tiles"))
    assert blocks_for(12544, 64, windows_of(image), 16) == Blocks(128, 64, 32)
    assert blocks_for(49, 512, windows_of(image), 1) == Blocks(32, 64, 32)
    assert blocks_for(1, 10, windows_of(words), 1) == Blocks(16, 16, 32)
    assert blocks_for(3136, 64, windows_of(row), 64) == Blocks(128, 64, 64)


UNSUPPORTED = {
    "integers": (lax.dot, (2, 3), (3, 4), jnp.int32),
    "float64 sums": (partial(lax.dot, preferred_element_type=jnp.float64), (2, 3), (3, 4), jnp.float32),
    "three products": (partial(lax.dot, precision="high"), (2, 3), (3, 4), jnp.float32),
    "feature groups": (partial(conv(), feature_group_count=2), (1, 4, 4, 2), (3, 3, 1, 2), jnp.float32),
    "lhs dilation": (
        partial(conv(padding=[(0, 0), (0, 0)]), lhs_dilation=(2, 1)),
        (1, 4, 4, 2),
        (3, 3, 2, 2),
        jnp.float32,
    ),
    "nothing": (lax.dot, (0, 3), (3, 4), jnp.float32),
}


@pytest.mark.parametrize(("call", "lhs", "rhs", "dtype"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_it_does_not_support(call, lhs, rhs, dtype):
    with jax.enable_x64(True) if call is UNSUPPORTED["float64 sums"][0] else contextlib.nullcontext():
        assert not indexed_gemm.supports(op_of(call, lhs, rhs, dtype))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # by JAX 0.11 and newer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_it_is_one_kernel_of_a_gpu_program(dtype):
    """Lowered for a GPU on a machine without one: the weights go to the kernel as they lie in the bank."""
    op = op_of(conv(precision=None), (1, 56, 56, 64), (3, 3, 64, 64), dtype)
    lhs, bank = jax.ShapeDtypeStruct((16, 1, *op.lhs.shape), dtype), jax.ShapeDtypeStruct((64, 576, 64), dtype)
    lanes = jax.ShapeDtypeStruct((16,), jnp.int32)
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(partial(indexed_gemm.run, op)).trace(lhs, Picked(bank, lanes))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton(") == 1
    assert not {"gather", "pad", "while", "slice"} & operations(text)
