"""Blocks where nothing was measured: as good as the best where something was, and nothing said of other ops."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import coalesce
from coalesce.bundle import packs
from coalesce.heavy import heavy_eqns, heavy_op, HeavyOp
from coalesce.models import by_name
from coalesce.tuning import Database, Entry, key_of, Tuned, tuned_on
from coalesce.tuning.estimate import best_blocks, FITS, us
from experiments.tile_model import measured, TENANTS


def op_of(call: Any, *shapes: tuple[int, ...], dtype: Any = jnp.float32) -> HeavyOp:
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    (eqn,) = heavy_eqns(jax.make_jaxpr(call)(*structs))
    return heavy_op(eqn)


H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


@pytest.mark.once  # a model of tiles, and what was measured: both know nothing of JAX
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_as_good_as_what_was_measured(dtype):
    """All ops of ResNet-50 together; experiments/tile_model.py shows the same of ops that were left out of the fit."""
    ops = measured(dtype)
    assert len(ops) >= 10
    fit = FITS[H200][jnp.dtype(dtype).itemsize]
    chosen = [best_blocks(one.op, TENANTS, 1, H200) for one in ops]
    times = [one.times[blocks] for one, blocks in zip(ops, chosen, strict=True) if blocks and blocks in one.times]
    assert len(times) == len(ops)
    assert sum(times) <= 1.1 * sum(one.best for one in ops)
    assert sum(times) < 0.9 * sum(one.other for one in ops)
    off = [us(fit, one.op, TENANTS, 1, blocks) / time for one in ops for blocks, time in one.times.items()]
    assert sorted(off)[len(off) // 2] == pytest.approx(1, abs=0.1)


DOT = op_of(lax.dot, (1024, 768), (768, 3072), dtype="bfloat16")


@pytest.mark.parametrize(("op", "rows", "device"), [
    (DOT, 1, "NVIDIA A100-SXM4-80GB"),
    (DOT, 1, "cpu"),
    (op_of(lax.dot, (128, 768), (768, 3072), dtype="bfloat16"), 1, H200),
    (op_of(lax.dot, (1, 768), (768, 3072), dtype="bfloat16"), 8, H200),
    (op_of(partial(lax.dot, precision="highest"), (1024, 768), (768, 3072)), 1, H200),
    (op_of(lax.dot, (128, 768), (768, 3072)), 1, H200),
    (op_of(lax.batch_matmul, (12, 128, 64), (12, 64, 128), dtype="bfloat16"), 1, H200),
])  # fmt: skip
def test_nothing_is_said_of_what_nothing_was_measured_like(op, rows, device):
    """Another device, a few rows, exact float32, float32 of few rows, products without weights."""
    assert best_blocks(op, 8, rows, device) is None
    assert Tuned(Database(), device).kernel(op, 8, rows) is None


@pytest.mark.parametrize("device", [H100, H200])
def test_an_op_that_was_not_tuned(device):
    tuned = Tuned(Database(), device)
    blocks = tuned.blocks(DOT, 8, 1, "indexed_gemm")
    assert tuned.kernel(DOT, 8, 1) == "indexed_gemm" and blocks == best_blocks(DOT, 8, 1, device)
    assert blocks and (blocks.m, blocks.n) != (16, 16) and max(blocks.m, blocks.n) <= 128
    assert tuned.blocks(DOT, 8, 1, "batched_dot") is None and tuned.us(DOT, 8, 1, "indexed_gemm") is None
    assert tuned_on(device, False).kernel(DOT, 8, 1) is None


def test_what_was_measured_goes_before_it():
    tuned = Tuned(Database({key_of(DOT, 16, 1, H200): Entry("batched_dot", 1.0)}), H200)
    assert tuned.kernel(DOT, 16, 1) == tuned.kernel(DOT, 8, 1) == tuned.kernel(DOT, 128, 1) == "batched_dot"
    assert tuned.kernel(DOT, 3, 1) == "indexed_gemm"  # too far from it


def test_a_network_that_nobody_tuned(monkeypatch):
    """Every convolution of a VGG-16 of three or more channels runs in place, with blocks; so does none elsewhere."""
    model = by_name("vgg16", image_size=64, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0))
    programs = [coalesce.trace(model.apply, params, *model.inputs(1), name=f"t{i}") for i in range(4)]

    def kernels(device: str) -> list[tuple[str, Any]]:
        monkeypatch.setattr("coalesce.compile.default_tuned", lambda *_: tuned_on(device))
        bundle = coalesce.fuse(programs, platform="gpu").bundle
        return [(pack.kernel, pack.blocks) for pack in packs(bundle.schedule) if pack.op.kind == "conv"]

    found = kernels(H100)
    assert len(found) == 13 and all(kernel == "indexed_gemm" and blocks for kernel, blocks in found[:10])
    assert {kernel for kernel, _ in kernels("NVIDIA A100-SXM4-80GB")} == {"conv_slices"}
