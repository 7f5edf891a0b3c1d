"""mosaic_gemm: tiles, what it reads and shares, interpreted; and lowering for a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh

from coalesce.blocks import Blocks
from coalesce.bundle import packs
from coalesce.costs import Costs, devices
from coalesce.heavy import HeavyOp
from coalesce.kernels import choose, indexed_gemm, mosaic_gemm
from coalesce.kernels.epilogue import COLUMN, Epilogue, WHOLE
from coalesce.kernels.mosaic import on_hopper
from coalesce.kernels.mosaic_registers import equal_share, FETCHING, larger_share
from coalesce.kernels.mosaic_tile import tile_of
from coalesce.passes.keep_layouts import kernel_for
from coalesce.slab import Cut, Picked
from coalesce.tf32 import near, nearest
from coalesce.tuning import packaged, tuned_on
from coalesce.tuning.candidates import candidates
from tests.alone import alone, check_fused, Tenant
from tests.compare import assert_same
from tests.hlo import operations
from tests.mosaic_ops import conv, dot, op_of
from tests.serving import BY_SLOT, fit_of, serve

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # by JAX 0.11 and newer
interprets = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.10 interprets no wgmma")


def values(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Small whole numbers, so that any order of summation gives the same."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), dtype)


def laid_out(op: HeavyOp, w: Any) -> Any:
    return jax.vmap(mosaic_gemm.layout(op))(w)


def plain(op: HeavyOp, x: Any, w: Any) -> Any:
    """In float32, [G,R,*lhs] x [G,*rhs]."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    if op.kind == "dot":
        return jnp.einsum("grmk,gkn->grmn", x, w)
    one = partial(
        lax.conv_general_dilated,
        window_strides=op.params["window_strides"],
        padding=op.params["padding"],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jax.vmap(jax.vmap(one, (0, None)))(x, w)


def run(op: HeavyOp, blocks: Blocks, x: Any, w: Any, *more: Any) -> Any:
    tile = tile_of(op, blocks)
    assert tile
    return mosaic_gemm.fetched(tile, x, w, *more, interpreted=True)


def column(op: HeavyOp, problems: int, kind: str, dtype: Any = jnp.float32) -> Any:
    shape = (problems, 1, *op.out.shape) if kind == WHOLE else (problems, 1, op.n)
    return jax.ShapeDtypeStruct(shape, dtype)


def normalise(y: Any, mean: Any, scale: Any, residual: Any) -> Any:
    z = (y.astype(jnp.float32) - mean) * scale
    return jnp.maximum(z.astype(y.dtype) + residual, 0)


def normalised(dtype: Any) -> Epilogue:
    return Epilogue(normalise, (COLUMN, COLUMN, WHOLE), jnp.dtype(dtype))


@pytest.mark.parametrize("groups", [3, 4, 5, 6, 7])
def test_warpgroups_ask_for_no_more_registers_than_there_are(groups):
    """A core has 65,536, and a warpgroup 128 threads."""
    launched = equal_share(groups) * (groups + 1)
    assert launched * 128 <= 65536
    assert equal_share(groups) <= larger_share(groups)
    assert larger_share(groups) * groups + FETCHING <= launched


INTERPRETED = {
    "rows beyond the last": (dot(70, 128, 64), Blocks(64, 64, 64, 4, 2)),
    "a window's rows shared": (conv(9, 10, 64, 64), Blocks(128, 64, 64, 8, 3)),
    "32 bits": (dot(70, 64, 128, jnp.float32), Blocks(64, 64, 64, 4, 2)),
    "a window in 32 bits": (conv(9, 10, 64, 64, jnp.float32), Blocks(128, 64, 32, 8, 3)),
    "strides": (conv(10, 12, 64, 64, window_strides=(2, 2)), Blocks(64, 64, 64, 4, 3)),
    "strides and other windows": (
        conv(6, 12, 64, 64, jnp.float32, taps=(4, 2), padding=((3, 1), (1, 0)), window_strides=(2, 3)),
        Blocks(64, 64, 32, 4, 3),
    ),
    "turned": (dot(70, 128, 128), Blocks(72, 128, 64, 8, 2, turned=True)),
    "32 bits, turned": (dot(70, 64, 128, jnp.float32), Blocks(72, 128, 32, 8, 2, turned=True, over=True)),
    "96 columns": (dot(70, 64, 96, jnp.float32), Blocks(64, 96, 32, 4, 2)),
    "a window, turned, two tiles": (conv(9, 10, 64, 64), Blocks(80, 64, 64, 4, 3, turned=True)),
    "other windows": (conv(5, 9, 64, 64, taps=(2, 3), padding=((1, 2), (0, 1))), Blocks(64, 64, 64, 4, 3)),
}


@interprets
@pytest.mark.slow
@pytest.mark.parametrize(("op", "blocks"), INTERPRETED.values(), ids=INTERPRETED)
def test_tiles(op, blocks):
    """Of two problems with two lanes each."""
    x, w = (values(i, 2, *shape, dtype=op.lhs.dtype) for i, shape in enumerate([(2, *op.lhs.shape), op.rhs.shape]))
    got = run(op, blocks, x, laid_out(op, w))
    np.testing.assert_array_equal(np.asarray(got, np.float32), plain(op, x, w).astype(op.out.dtype))


@interprets
@pytest.mark.parametrize(
    ("dtype", "blocks"),
    [
        (jnp.bfloat16, Blocks(64, 64, 64, 4, 3)),
        (jnp.float32, Blocks(64, 64, 32, 4, 3)),
        (jnp.bfloat16, Blocks(48, 64, 64, 4, 3, turned=True)),
        (jnp.float32, Blocks(48, 64, 32, 4, 3, turned=True, over=True)),
    ],
    ids=["16 bits", "32 bits", "turned", "32 bits, turned and over"],
)
def test_epilogue_and_operands_in_slabs(dtype, blocks):
    """Rows of slabs that nobody picks may hold anything."""
    op, slots = conv(5, 6, 64, 64, dtype), jnp.asarray([3, 1])
    x, residual = values(0, 2, 1, *op.lhs.shape, dtype=dtype), values(1, 2, 1, *op.out.shape, dtype=dtype)
    weights = laid_out(op, values(2, 4, *op.rhs.shape, dtype=dtype))
    shape, start = weights.shape[1:], mosaic_gemm.granule(weights.shape[1:], dtype)
    slab = jnp.pad(weights.reshape(4, -1), ((0, 0), (start, 2 * start)), constant_values=jnp.nan)
    vectors = values(3, 4, 3 * op.n).astype(jnp.float32)
    unread = jnp.asarray([0, 2])
    slab, vectors = slab.at[unread].set(jnp.nan), vectors.at[unread].set(jnp.nan)
    rhs = Picked(Cut(slab, start, shape), slots)
    mean, scale = (Picked(Cut(vectors, i * op.n, (op.n,)), slots) for i in (1, 2))
    got = run(op, blocks, x, rhs, normalised(dtype), (mean, scale, residual))
    y = plain(op, x, values(2, 4, *op.rhs.shape)[slots]).astype(dtype)
    want = normalise(y, mean.read()[:, None, None, None, None], scale.read()[:, None, None, None, None], residual)
    np.testing.assert_array_equal(np.asarray(got, np.float32), want.astype(jnp.float32))


def test_operands_of_32_bits_are_rounded_before_they_are_cut():
    """A GPU cuts what TF32 has no place for; every sum would be smaller by a thousandth, and a network's by all."""
    op, nearby = dot(70, 32, 64, jnp.float32), partial(lax.reduce_precision, exponent_bits=8, mantissa_bits=10)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, *op.rhs.shape)), jnp.float32)
    flat = jax.vmap(indexed_gemm.layout(op))
    np.testing.assert_array_equal(laid_out(op, w), flat(nearby(w)))
    assert mosaic_gemm.layout(dot(70, 64, 64)) == indexed_gemm.layout(dot(70, 64, 64))
    texts = [lowered(op, None, SUM, column(op, 16, COLUMN), rounded=comes) for comes in (False, True)]
    assert ["stablehlo.reduce_precision" in text for text in texts] == [True, False]


def test_the_nearest_number():
    special = jnp.asarray([jnp.inf, -jnp.inf, 0.0, -0.0, 1.0, 3.4e38, 1 + 2**-12, -1 - 3 * 2**-12])
    np.testing.assert_array_equal(nearest(special), near(special))
    nans = lax.bitcast_convert_type(jnp.asarray([0x7FFFFFFF, -1, 0x7FC00000], jnp.int32), jnp.float32)
    half = jnp.asarray([1 + 2**-11, 1 + 3 * 2**-11])
    for rounds, halves in ((nearest, [1 + 2**-10, 1 + 2**-9]), (near, [1.0, 1 + 2**-9])):
        np.testing.assert_array_equal(nearest(rounds(special)), rounds(special))
        np.testing.assert_array_equal(rounds(half), halves)
        assert np.isnan(rounds(nans)).all()


def test_elsewhere_than_on_an_nvidia_gpu_it_is_indexed_gemm():
    op, blocks = dot(20, 64, 64), Blocks(64, 64, 64, 4, 2)
    x, w = values(0, 2, 1, *op.lhs.shape), values(1, 2, *op.rhs.shape)
    got = jax.jit(lambda x, w: mosaic_gemm.run(op, x, w, blocks=blocks))(x, w)
    np.testing.assert_array_equal(np.asarray(got, np.float32), plain(op, x, w).astype(jnp.bfloat16))


def everything(y: Any, z: Any) -> Any:
    """Every operation that is lowered, on a tile, in 32 bits where a GPU has no others."""
    dtype, y = y.dtype, y.astype(z.dtype)
    a = jax.nn.sigmoid(jnp.tanh(jnp.abs(y)) * jnp.exp(-z)) / jnp.square(z) - jnp.log(lax.rsqrt(y) + z)
    b = jnp.where((y < z) & ~(y <= z) | (y > 1) & (y >= z) | (y == z) & (y != z), a, jnp.sign(y))
    return jnp.minimum(jnp.maximum(a, b) + 1, 2).astype(dtype)


EVERYTHING = Epilogue(everything, (COLUMN,), jnp.dtype(jnp.bfloat16))
SUM = Epilogue(jnp.add, (COLUMN,), jnp.dtype(jnp.float32))


def lowered(op: HeavyOp, blocks: Blocks | None, epilogue: Epilogue, *given: Any, **how: Any) -> str:
    """Of two layers of a network for a GPU, on a machine without one."""
    structs = [
        jax.ShapeDtypeStruct((16, 1, *op.lhs.shape), op.lhs.dtype),
        jax.ShapeDtypeStruct((24, 4 * op.k * op.n), op.rhs.dtype),
        jax.ShapeDtypeStruct((16,), jnp.int32),
        *given,
    ]

    def call(x: Any, slab: Any, slots: Any, *given: Any) -> Any:
        shape = mosaic_gemm.layout(op).of(op.rhs.shape)
        layers = [Picked(Cut(slab, start * op.k * op.n, shape), slots) for start in (1, 2)]
        own = [Epilogue(lambda *z: epilogue.apply(*z), epilogue.kinds, epilogue.dtype) for _ in layers]  # noqa: PLW0108
        return [mosaic_gemm.run(op, x, w, e, given, blocks, **how) for w, e in zip(layers, own, strict=True)]

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        return jax.jit(call).trace(*structs).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_is_one_kernel_of_a_gpu_program(dtype):
    """Weights go to it as they lie in a slab, and every operation of an epilogue runs in it. Layers that are alike but
    for their weights' place are calls of one function with one kernel, which is compiled once."""
    op, blocks = conv(14, 14, 128, 256, jnp.dtype(dtype)), None if dtype == "float32" else Blocks(64, 128, 64, 4, 6)
    text = lowered(op, blocks, replace(EVERYTHING, dtype=jnp.dtype(dtype)), column(op, 16, COLUMN))
    assert text.count("@mosaic_gpu") == 1 and "xla.gpu.triton" not in text
    assert text.count("call @launched") == 2
    assert not {"gather", "pad", "slice", "maximum"} & operations(text)


OUTSIDE = {
    "what it does not lower": Epilogue(lambda y, z: y + jnp.sin(z).astype(y.dtype), (COLUMN,), jnp.dtype(jnp.bfloat16)),
    "a result of 32 bits": Epilogue(lambda y, z: y.astype(z.dtype) + z, (COLUMN,), jnp.dtype(jnp.float32)),
}


@pytest.mark.parametrize("epilogue", OUTSIDE.values(), ids=OUTSIDE)
def test_what_it_cannot_run_xla_runs_after_it(epilogue):
    op = dot(100, 64, 64)
    given = column(op, 16, COLUMN)
    text = lowered(op, Blocks(64, 64, 64, 4, 1), epilogue, given)
    assert text.count("@mosaic_gpu") == 1 and "stablehlo.add" in text


SUPPORTED = {
    "a dot": (dot(5, 64, 128), True),
    "a convolution": (conv(5, 5, 64, 64), True),
    "32 bits": (dot(5, 96, 192, jnp.float32), True),
    "32 bits that count": (op_of(partial(lax.dot, precision="highest"), (5, 96), (96, 192), jnp.float32), False),
    "rows that TMA cannot swizzle": (dot(5, 96, 128), False),
    "columns that it cannot": (dot(5, 64, 1000), False),
    "strides": (conv(8, 9, 64, 64, window_strides=(2, 1)), True),
    "strides that do not divide the image": (conv(8, 9, 64, 64, window_strides=(2, 2)), False),
    "dilation": (conv(8, 8, 64, 64, rhs_dilation=(2, 2)), False),
    "a border left out": (conv(8, 8, 64, 64, padding=((-1, 1), (0, 0))), False),
}


@pytest.mark.parametrize(("op", "supported"), SUPPORTED.values(), ids=SUPPORTED)
def test_what_it_supports(op, supported):
    assert mosaic_gemm.supports(op) == supported


def test_a_cut_that_is_no_whole_tiles_is_refused():
    """Who lays weights out sees to it: TMA would read zeros where a tile begins elsewhere."""
    op, slab = dot(5, 64, 128), jnp.zeros((2, 128 * 200), jnp.bfloat16)
    x = jnp.zeros((2, 1, 5, 64), jnp.bfloat16)
    for start, size in ((128, 128 * 200), (1024, 128 * 199)):
        with pytest.raises(AssertionError, match="a slab that TMA cannot read"):
            run(op, Blocks(64, 64, 64, 4, 2), x, Cut(slab[:, :size], start, (64, 128)))


def by_tma(op: HeavyOp, groups: int, platform: str) -> str:
    return "mosaic_gemm" if mosaic_gemm.supports(op) else choose(op, groups, platform)


def tower(params: Any, x: Any) -> Any:
    for w, b in params:
        x = jnp.maximum(x @ w + b[None], 0)
    return x


def towers(count: int) -> list[Tenant]:
    """Biases between the weights, so that a weight would not begin where TMA may read it if nobody saw to it. All that
    they multiply are whole numbers that TF32 has."""
    random, sizes = np.random.default_rng(0), (64, 192, 320, 64)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(random.integers(-1, 2, shape), jnp.float32)

    params = [[(array(*size), array(size[1])) for size in zip(sizes, sizes[1:], strict=False)] for _ in range(count)]
    return [(tower, own, (array(3, sizes[0]),)) for own in params]


def test_programs_lay_weights_where_it_can_read_them():
    """Of a fixed set of tenants, and of those whose weights are read by slot."""
    tenants = towers(3)
    fused = check_fused(tenants, choose_kernel=by_tma)
    assert {pack.kernel for pack in packs(fused.bundle.schedule)} == {"mosaic_gemm"} and fused.bundle.slabs
    served = serve([fit_of(fn, p, x) for fn, p, x in tenants], options=replace(BY_SLOT, choice=by_tma))
    executable = served.executable(2)
    assert {pack.kernel for pack in packs(executable.bundle.schedule)} == {"mosaic_gemm"}
    for lanes in ([2, 0], [1, 2]):
        for tenant, got in zip(lanes, served.call(executable, [(t, tenants[t][2]) for t in lanes]), strict=True):
            assert_same(got, alone(tenants[tenant]))


def test_a_program_of_it_in_two_executables():
    """Which reads the kernel's own jaxpr, to see where it may be cut."""
    check_fused(towers(2), choose_kernel=by_tma, executables=2)


class Gpu(NamedTuple):
    device_kind: str
    compute_capability: str


def test_only_a_hopper_gpu_is_given_it():
    """Others have no such instructions: neither what is measured there, nor a rule, nor what comes along names it."""
    assert on_hopper(Gpu("NVIDIA H200", "9.0"))
    ops = [conv(14, 14, 256, 256), dot(196, 1024, 256), dot(196, 1024, 256, jnp.float32)]
    costs = Costs(devices.H100)
    for device in (Gpu("NVIDIA A100-SXM4-80GB", "8.0"), Gpu("NVIDIA B200", "10.0"), jax.devices()[0]):
        assert not on_hopper(device)
        tuned = tuned_on(device.device_kind, packaged())
        for op in ops:
            assert mosaic_gemm.supports(op)
            tried = candidates(op, 16, 1, "gpu", on_hopper(device))
            assert "mosaic_gemm" not in {kernel for kernel, _ in tried}
            rule = tuned.kernel(op, 16, 1) or choose(op, 16, "gpu")
            held = [mosaic_gemm.layout(op)]
            chosen = kernel_for(op, 16, 1, rule, held, 1 << 30, costs, stands=False, one_row=False)
            assert "mosaic_gemm" not in (rule, chosen)
