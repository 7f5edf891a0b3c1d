"""horizontal: products of different shapes in one launch are what each is alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh

from coalesce.heavy import heavy_op, HeavyOp
from coalesce.kernels import horizontal, indexed_gemm
from coalesce.kernels.epilogue import COLUMN, Epilogue, WHOLE
from coalesce.kernels.indexed_gemm import Blocks, product_of
from coalesce.slab import Picked
from tests.alone import array
from tests.compare import assert_bitwise
from tests.heavy_cases import Case, convs, dots
from tests.hlo import operations
from tests.programs import many_compiles

DOT = partial(lax.dot, precision="highest")
CONV = partial(
    lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", precision="highest",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def cheap_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with many_compiles(tmp_path_factory.mktemp("compiled")):
        yield


def op_of(call: Any, lhs: tuple[int, ...], rhs: tuple[int, ...], dtype: Any = jnp.float32) -> HeavyOp:
    (eqn,) = jax.make_jaxpr(call)(jax.ShapeDtypeStruct(lhs, dtype), jax.ShapeDtypeStruct(rhs, dtype)).jaxpr.eqns
    return heavy_op(eqn)


def together(calls: list[tuple[Any, ...]]) -> list[Any]:
    """The results of (op, lhs, rhs, epilogue, operands, blocks) in one launch."""
    return horizontal.run([product_of(*call) for call in calls])


supported = (dots() | convs()).filter(lambda case: indexed_gemm.supports(case.op))


@settings(max_examples=max(5, settings().max_examples // 10))  # interpreted kernels take their time
@given(st.lists(supported, min_size=1, max_size=3), st.integers(0, 99), st.sampled_from([np.nan, np.inf]))
@pytest.mark.once
def test_each_product_is_what_it_is_alone(cases: list[Case], seed: int, poison: float) -> None:
    """Of any shapes and dtypes, dots beside convolutions; and poison in one leaves the others as they are."""
    ops = [case.op for case in cases]
    data = [case.data(seed) for case in cases]

    @jax.jit
    def both(given: Any) -> Any:
        calls = [(op, x, jax.vmap(indexed_gemm.layout(op))(w)) for op, (x, w) in zip(ops, given, strict=True)]
        return together(calls), [indexed_gemm.run(*call) for call in calls]

    got, want = both(data)
    assert_bitwise(got, want)
    bad = seed % len(cases)
    x, w = data[bad]
    dirty, _ = both([(jnp.full_like(x, poison), w) if i == bad else own for i, own in enumerate(data)])
    for i in range(len(cases)):
        if i != bad:
            assert_bitwise(dirty[i], want[i])


def test_slots_epilogues_and_blocks_of_their_own():
    """A dot read by slot in small tiles with a residual; heads in others; a convolution with a bias for each lane."""
    heads = partial(lax.dot_general, dimension_numbers=(((2,), (1,)), ((0,), (0,))), precision="highest")
    plus = Epilogue(lambda y, z: lax.max(y + z, 0.0), (WHOLE,), jnp.float32)
    bias = Epilogue(lambda y, z: y * z, (COLUMN,), jnp.float32)
    dot, many, conv = (
        op_of(DOT, (40, 33), (33, 47)),
        op_of(heads, (3, 20, 18), (3, 18, 17)),
        op_of(CONV, (1, 7, 6, 20), (3, 3, 20, 24)),
    )
    small, large = Blocks(16, 16, 16), Blocks(32, 32, 32, warps=8, stages=2)
    slots = jnp.asarray([4, 1, 4])
    calls = [
        (dot, array(3, 1, 40, 33), array(5, 33, 47), plus, (array(3, 1, 40, 47),), small),
        (many, array(3, 2, 3, 20, 18), array(5, 3, 18, 17), None, (), large),
        (conv, array(2, 2, 1, 7, 6, 20), array(2, 3, 3, 20, 24), bias, (array(2, 2, 24),), None),
    ]
    calls = [(op, x, jax.vmap(indexed_gemm.layout(op))(w), *rest) for op, x, w, *rest in calls]
    calls = [(op, x, Picked(w, slots) if len(w) == 5 else w, *rest) for op, x, w, *rest in calls]
    assert_bitwise(together(calls), [indexed_gemm.run(*call) for call in calls])


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # by JAX 0.11 and newer
def test_it_is_one_kernel_of_a_gpu_program():
    """Lowered for a GPU on a machine without one; nothing is padded, copied or put together."""
    shapes = [(CONV, (1, 28, 28, 64), (3, 3, 64, 64), jnp.bfloat16), (DOT, (128, 768), (768, 768), jnp.float32)]
    ops = [op_of(*shape) for shape in shapes]
    structs = [
        (
            jax.ShapeDtypeStruct((4, 1, *op.lhs.shape), op.lhs.dtype),
            jax.ShapeDtypeStruct((4, *indexed_gemm.layout(op).of(op.rhs.shape)), op.rhs.dtype),
        )
        for op in ops
    ]
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(lambda args: together([(op, *own) for op, own in zip(ops, args, strict=True)])).trace(structs)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton(") == 1
    moves = {"gather", "pad", "while", "slice", "concatenate"}
    assert not moves & operations(text)
