"""Products of strided slices, read from the image itself."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import coalesce
from coalesce import jaxpr as J
from coalesce.blocks import Blocks
from coalesce.bundle import packs
from coalesce.fused import Fused
from coalesce.strided import in_place, slices_in
from tests.compare import assert_same

KEYS = jax.random.split(jax.random.key(0), 8)


def shortcut(strides, limits=None, starts=(0, 0, 0, 0)):
    """Every n-th position of an image, times weights, and something elementwise behind."""

    def apply(params, x):
        part = lax.slice(x, starts, limits or x.shape, (1, *strides, 1))
        y = lax.dot_general(part, params["w"], (((3,), (0,)), ((), ())), precision="highest")
        return jnp.maximum(y + params["b"].reshape(1, 1, 1, -1), 0) + 1

    return apply


def fused(apply, image, kernel="indexed_gemm") -> tuple[Fused, list, list]:
    params = [{"w": jax.random.normal(k, (16, 20)), "b": jnp.full((20,), 0.1)} for k in KEYS[:2]]
    inputs = [(jax.random.normal(k, (1, *image)),) for k in KEYS[4:6]]
    programs = [coalesce.trace(apply, p, *x, name=f"t{i}") for i, (p, x) in enumerate(zip(params, inputs, strict=True))]
    return coalesce.fuse(programs, choose_kernel=lambda *_: kernel), params, inputs


CASES = {
    "every second": (shortcut((2, 2)), (6, 8, 16), True),
    "odd sizes, one stride": (shortcut((2, 1)), (5, 3, 16), True),
    "every third": (shortcut((3, 3)), (7, 8, 16), True),
    "all": (shortcut((1, 1)), (4, 4, 16), False),
    "not to the end": (shortcut((2, 2), (1, 4, 8, 16)), (8, 8, 16), False),
    "not from the start": (shortcut((2, 2), starts=(0, 1, 0, 0)), (8, 8, 16), False),
    "some channels": (shortcut((2, 2), (1, 8, 8, 16)), (8, 8, 24), False),
}


@pytest.mark.parametrize(("apply", "image", "reads"), CASES.values(), ids=CASES)
@pytest.mark.once
def test_each_tenants_result(apply, image, reads):
    program, params, inputs = fused(apply, image)
    (pack,) = packs(program.bundle.schedule)
    found = in_place(pack, slices_in(program.bundle))
    assert (found is not None) == reads
    if found:
        assert found[0].op.kind == "conv" and J.shape(found[1]) == (1, *image)
    for got, p, x in zip(program(inputs), params, inputs, strict=True):
        assert_same(got, apply(p, *x))


@pytest.mark.parametrize(("strides", "reads"), [((2, 2), True), ((3, 2), False)], ids=["that divide it", "others"])
def test_tiles_of_tma_take_strides_that_divide_an_image(strides, reads):
    """In bfloat16; as for any convolution."""
    apply = shortcut(strides)
    params = {"w": jnp.ones((64, 64), jnp.bfloat16), "b": jnp.ones((64,), jnp.bfloat16)}
    x = jnp.ones((1, 8, 8, 64), jnp.bfloat16)
    programs = [coalesce.trace(apply, jax.tree.map(lambda p, n=n: n * p, params), x, name=str(n)) for n in (1, 2)]
    program = coalesce.fuse(programs, choose_kernel=lambda *_: "mosaic_gemm")
    (pack,) = packs(program.bundle.schedule)
    assert (in_place(pack, slices_in(program.bundle)) is not None) == reads
    assert [float(jnp.mean(y)) for y in program([(x,), (x,)])] == [66, 131]


def test_other_kernels_read_slices():
    program, params, inputs = fused(CASES["every second"][0], (6, 8, 16), "batched_dot")
    (pack,) = packs(program.bundle.schedule)
    assert in_place(pack, slices_in(program.bundle)) is None
    for got, p, x in zip(program(inputs), params, inputs, strict=True):
        assert_same(got, CASES["every second"][0](p, *x))


def test_by_tma_only_in_as_few_tiles():
    """200 positions of a product in one tile are 25 rows of an image by 8 columns, which has 14 of each."""
    image, weights = (14, 14, 64), jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)

    def apply(params, x):
        return lax.dot_general(lax.slice(x, (0,) * 4, x.shape, (1, 2, 2, 1)), params, (((3,), (0,)), ((), ())))

    x = jax.ShapeDtypeStruct((1, 28, 28, 64), jnp.bfloat16)
    programs = [coalesce.trace(apply, weights, x, name=name) for name in "ab"]
    bundle = coalesce.fuse(programs, choose_kernel=lambda *_: "mosaic_gemm", platform="gpu").bundle
    (pack,) = packs(bundle.schedule)
    assert pack.op.m == image[0] * image[1]
    for blocks, reads in ((Blocks(128, 64, 64, 8, 1), True), (Blocks(200, 64, 64, 4, 1, turned=True), False)):
        assert (in_place(replace(pack, blocks=blocks), slices_in(bundle)) is not None) == reads
