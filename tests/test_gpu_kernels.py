"""Pallas kernels on an NVIDIA GPU. Skipped elsewhere; run with `pytest -m gpu`."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import coalesce
from coalesce.blocks import Blocks
from coalesce.bundle import Attention, items, packs, Rowwise
from coalesce.heavy import heavy_op, HeavyOp
from coalesce.kernels import chained, horizontal, indexed_gemm, indexed_matvec, KERNELS, mosaic_attention, mosaic_gemm
from coalesce.kernels.epilogue import COLUMN, Epilogue, larger, WHOLE
from coalesce.kernels.mosaic_tile import tile_of
from coalesce.slab import Cut, Picked
from tests.heavy_cases import indexed
from tests.hlo import moves_of_size
from tests.test_chained import in_turn
from tests.test_gpu import distance, fused_of, setup, widened
from tests.test_mosaic_attention import weightless, within

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),  # by JAX 0.11 and newer
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


def on_hopper() -> bool:
    return str(getattr(jax.devices()[0], "compute_capability", "")) == "9.0"


def op_of(call: Any, lhs: Any, rhs: Any) -> HeavyOp:
    (eqn,) = jax.make_jaxpr(call)(lhs, rhs).jaxpr.eqns
    return heavy_op(eqn)


@pytest.mark.parametrize(("dtype", "precision", "limit"), [
    ("float32", "highest", 1e-5), ("float32", None, 1e-3), ("bfloat16", None, 1e-2), ("float16", None, 2e-3),
])  # fmt: skip
@pytest.mark.parametrize(("window", "stride", "channels"), [(1, 1, 64), (1, 2, 48), (3, 1, 64), (3, 2, 40), (7, 2, 3)])
def test_convolutions(dtype, precision, limit, window, stride, channels):
    conv = partial(
        lax.conv_general_dilated, window_strides=(stride, stride), padding="SAME", precision=precision,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (5, 2, 1, 30, 31, channels), dtype)
    bank = jax.random.normal(keys[1], (7, window, window, channels, 72), dtype)
    slots = jnp.asarray([6, 0, 3, 3, 5])
    op = op_of(conv, x[0, 0], bank[0])
    got = jax.jit(partial(indexed_gemm.run, op))(x, Picked(jax.vmap(indexed_gemm.layout(op))(bank), slots))
    exact = jax.vmap(jax.vmap(partial(conv, precision="highest"), (0, None)))
    want = exact(x.astype(jnp.float32), bank[slots].astype(jnp.float32))
    assert distance(got, want) <= limit


@pytest.mark.skipif(not on_hopper(), reason="needs wgmma and TMA")
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 5e-4), ("bfloat16", 1e-2), ("float16", 2e-3)])
@pytest.mark.parametrize(("window", "stride", "height", "width", "blocks"), [
    (1, 1, 28, 28, None),
    (1, 1, 28, 28, Blocks(64, 128, 64, 4, 6)),
    (1, 1, 14, 14, Blocks(256, 64, 64, 16, 3)),
    (3, 1, 14, 14, Blocks(64, 128, 64, 4, 6)),
    (3, 1, 28, 28, Blocks(128, 64, 128, 8, 3)),
    (3, 1, 57, 30, Blocks(64, 64, 64, 4, 4)),
    (5, 1, 7, 7, Blocks(64, 64, 64, 4, 12)),
    (3, 2, 28, 28, Blocks(64, 128, 64, 4, 6)),
    (5, 3, 15, 21, Blocks(64, 64, 64, 4, 4)),
    (1, 1, 14, 14, Blocks(112, 128, 64, 8, 2, turned=True)),
    (3, 1, 14, 14, Blocks(112, 64, 128, 4, 6, turned=True)),
    (3, 2, 28, 28, Blocks(80, 128, 64, 4, 4, turned=True)),
    (5, 1, 7, 7, Blocks(56, 64, 64, 4, 9, turned=True)),
    (3, 1, 14, 14, Blocks(112, 128, 64, 8, 4, turned=True, over=True)),
    (1, 1, 28, 28, Blocks(128, 128, 64, 8, 3, over=True)),
])  # fmt: skip
def test_tiles_by_tma(dtype, limit, window, stride, height, width, blocks):
    """Two lanes on each row that is picked from a slab, in which weights begin where a tile may."""
    conv = partial(
        lax.conv_general_dilated, window_strides=(stride, stride), padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (5, 2, 1, height, width, 128), dtype)
    bank = jax.random.normal(keys[1], (7, window, window, 128, 128), dtype)
    slots = jnp.asarray([6, 0, 3, 3, 5])
    op = op_of(conv, x[0, 0], bank[0])
    blocks = blocks and replace(blocks, k=blocks.k * 2 // op.lhs.dtype.itemsize)
    assert blocks is None or tile_of(op, blocks)
    rows = jax.vmap(mosaic_gemm.layout(op))(bank)
    start = 3 * mosaic_gemm.granule(rows.shape[1:], dtype)
    slab = jnp.pad(rows.reshape(7, -1), ((0, 0), (start, 2 * start)), constant_values=jnp.nan)
    rhs = Picked(Cut(slab, start, rows.shape[1:]), slots)
    got = jax.jit(partial(mosaic_gemm.run, op, blocks=blocks))(x, rhs)
    exact = jax.vmap(jax.vmap(partial(conv, precision="highest"), (0, None)))
    want = exact(x.astype(jnp.float32), bank[slots].astype(jnp.float32))
    assert distance(got, want) <= limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "vit_ti16", "bert_small", "lstm", "mlp"])
def test_models_with_epilogues(name, dtype):
    """Against float32 at highest precision, in norm over all tenants: as good as each alone."""
    with jax.default_matmul_precision("highest"):
        model, params, inputs = setup(name, dtype)
        reference, _, _ = setup(name, "float32", 0)
        fused = fused_of(model, params, inputs, choose_kernel=indexed)
        assert any(pack.epilogue for pack in packs(fused.bundle.schedule))
        alone, exact = (jax.jit(lambda p, x, m=m: m.apply(p, *x)) for m in (model, reference))
        own = [alone(p, x) for p, x in zip(params, inputs, strict=True)]
        want = [exact(p, jax.tree.map(widened, x)) for p, x in zip(params, inputs, strict=True)]
        results = fused(inputs)
    error, own_error = (np.linalg.norm([*map(distance, got, want)]) for got in (results, own))
    assert error <= max(1.5 * own_error, 1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_lane_reaches_no_other(poison):
    model, params, inputs = setup("resnet18", "float32")
    fused = fused_of(model, params, inputs, choose_kernel=indexed)
    clean = [np.asarray(y) for y in fused(inputs)]
    bad = [*inputs[:2], (jnp.full_like(inputs[2][0], poison),), *inputs[3:]]
    dirty = [np.asarray(y) for y in fused(bad)]
    assert not np.isfinite(dirty[2]).all()
    for lane in (0, 1, 3):
        assert distance(dirty[lane], clean[lane]) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_different_shapes_in_one_launch(dtype):
    """Those of four networks, each as it is in a launch of its own: the same tiles, the same sums."""
    conv = partial(
        lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    shapes = [
        (lax.dot, (128, 768), (768, 768)), (lax.dot, (49, 2048), (2048, 512)),
        (conv, (1, 14, 14, 256), (3, 3, 256, 256)), (conv, (1, 28, 28, 24), (1, 1, 24, 40)),
    ]  # fmt: skip
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(shapes)))
    calls = []
    for call, lhs, rhs in shapes:
        x, w = jax.random.normal(next(keys), (2, 1, *lhs), dtype), jax.random.normal(next(keys), (2, *rhs), dtype)
        op = op_of(call, x[0, 0], w[0])
        calls.append((op, x, jax.vmap(indexed_gemm.layout(op))(w)))
    ops = [op for op, _, _ in calls]

    @jax.jit
    def both(args):
        own = [(op, *arg) for op, arg in zip(ops, args, strict=True)]
        together = horizontal.run([indexed_gemm.product_of(*call) for call in own])
        return together, [indexed_gemm.run(*call) for call in own]

    for got, want in zip(*both([call[1:] for call in calls]), strict=True):
        assert distance(got, want) <= 1e-6


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("lanes", [1, 3])
def test_products_of_one_row(lanes, dtype, limit):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (5, lanes, 1, 500), dtype)
    bank = jax.random.normal(keys[1], (7, 500, 300), dtype)
    slots = jnp.asarray([6, 0, 3, 3, 5])
    op = op_of(lax.dot, x[0, 0], bank[0])
    got = jax.jit(partial(indexed_matvec.run, op))(x, Picked(jax.vmap(indexed_matvec.layout(op))(bank), slots))
    wide = x.astype(jnp.float32), bank[slots].astype(jnp.float32)
    assert distance(got, jnp.einsum("grmk,gkn->grmn", *wide, precision="highest")) <= limit


SHARED = {"residual networks": ("resnet18", "resnet50"), "encoders": ("bert_small", "vit_ti16")}


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("names", SHARED.values(), ids=SHARED)
def test_models_that_share_launches(names, dtype, limit):
    with jax.default_matmul_precision("highest"):
        parts = [setup(name, dtype, 2) for name in names]
        tenants = [(m, p, x) for m, params, inputs in parts for p, x in zip(params, inputs, strict=True)]
        programs = [coalesce.trace(m.apply, p, *x, name=f"t{i}") for i, (m, p, x) in enumerate(tenants)]
        fused = coalesce.fuse(programs, policy="always", choose_kernel=indexed, launches=True)
        assert fused.report.launches_shared
        results = fused([x for _, _, x in tenants])
        alone = [jax.jit(m.apply)(p, *x) for m, p, x in tenants]
    for got, want in zip(results, alone, strict=True):
        assert distance(got, want) <= limit


def test_a_poisoned_tenant_reaches_no_other_through_a_launch():
    parts = [setup(name, "float32", 2) for name in SHARED["residual networks"]]
    tenants = [(m, p, x) for m, params, inputs in parts for p, x in zip(params, inputs, strict=True)]
    programs = [coalesce.trace(m.apply, p, *x, name=f"t{i}") for i, (m, p, x) in enumerate(tenants)]
    fused = coalesce.fuse(programs, policy="always", choose_kernel=indexed, launches=True)
    inputs = [x for _, _, x in tenants]
    clean = [np.asarray(y) for y in fused(inputs)]
    dirty = [np.asarray(y) for y in fused([(jnp.full_like(inputs[0][0], np.nan),), *inputs[1:]])]
    assert not np.isfinite(dirty[0]).all()
    for lane in (1, 2, 3):
        assert distance(dirty[lane], clean[lane]) <= 1e-5


@pytest.mark.parametrize("cut", [False, True], ids=["array", "slab"])
@pytest.mark.parametrize("kernel", ["indexed_gemm", "indexed_matvec", "mosaic_gemm"])
def test_a_bank_of_more_than_two_billion_elements(kernel, cut):
    """Its last row lies beyond what 32 bits can address."""
    if kernel == "mosaic_gemm" and not on_hopper():
        pytest.skip("needs wgmma and TMA")
    size, m = 1024, 1 if kernel == "indexed_matvec" else 256
    rows = 2**31 // size**2 + 2
    product = partial(lax.dot, preferred_element_type=jnp.float32 if kernel != "mosaic_gemm" else None)
    left, right = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((m, size), (size, size)))
    op, x = op_of(product, left, right), jax.random.normal(jax.random.key(1), (2, 1, m, size), jnp.bfloat16)
    last = jax.random.normal(jax.random.key(0), right.shape, jnp.bfloat16)
    row = KERNELS[kernel].layout(op)(last)
    fill = jax.jit(lambda row: jnp.zeros((rows, *row.shape), jnp.bfloat16).at[-1].set(row))
    bank = Cut(fill(row.reshape(-1)), 0, row.shape) if cut else fill(row)
    got = jax.jit(partial(KERNELS[kernel].run, op))(x, Picked(bank, jnp.asarray([rows - 1, 0])))
    assert distance(got[0, 0], product(x[0, 0], last)) <= (1e-2 if kernel == "mosaic_gemm" else 1e-3)
    assert not np.asarray(got[1], np.float32).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("columns", [50, 128, 197, 256])
def test_attention(dtype, columns, monkeypatch):
    """Rows as long as tiles are, and not; padding, a mask and a bias."""
    by_tma: list[Any] = []
    run = mosaic_attention.run
    monkeypatch.setattr(mosaic_attention, "run", lambda *given: by_tma.append(given) or run(*given))

    def attention(p, x, keep):
        q, k, v = (jnp.einsum("td,dhk->thk", x, p["w"][i]) + p["b"][i][None] for i in range(3))
        scores = jnp.where(keep[None, None] > 0, jnp.einsum("mhd,nhd->hmn", q / 8.0, k), -1e4)
        return jnp.einsum("hmn,nhd->mhd", jax.nn.softmax(scores, axis=-1), v)

    def tenant(i: int) -> tuple[Any, Any]:
        w, b, x = jax.random.split(jax.random.key(i), 3)
        weights = {"w": jax.random.normal(w, (3, 96, 4, 64)) / 10, "b": jax.random.normal(b, (3, 4, 64))}
        keep = jnp.arange(columns) < columns - i - 1
        return jax.tree.map(lambda a: a.astype(dtype), (weights, (jax.random.normal(x, (columns, 96)), keep)))

    tenants = [tenant(i) for i in range(3)]
    programs = [coalesce.trace(attention, p, *x, name=f"t{i}") for i, (p, x) in enumerate(tenants)]
    fused = coalesce.fuse(programs, choose_kernel=lambda *op: "batched_dot")
    assert sum(isinstance(item, Attention) for item in items(fused.bundle.schedule)) == 1
    for (p, x), got in zip(tenants, fused([x for _, x in tenants]), strict=True):
        with jax.default_matmul_precision("highest"):
            want = jax.jit(attention)(*jax.tree.map(lambda a: a.astype(jnp.float32), (p, *x)))
        assert distance(got, want) <= {"float32": 2e-3, "float16": 5e-3, "bfloat16": 2e-2}[dtype]
    assert bool(by_tma) == (on_hopper() and dtype != "float32")


def test_attention_of_parts_of_arrays():
    """On a Hopper GPU by TMA."""
    given = weightless(within, (40, 4, 64), (1, 1, 100), (1, 3, 44))
    own = [(p, (y, keep > -1, bias)) for _, p, (y, keep, bias) in given]
    programs = [coalesce.trace(within, p, *x, name=f"t{i}") for i, (p, x) in enumerate(own)]
    fused = coalesce.fuse(programs, choose_kernel=lambda *op: "batched_dot")
    assert sum(isinstance(item, Attention) for item in items(fused.bundle.schedule)) == 1
    for (p, x), got in zip(own, fused([x for _, x in own]), strict=True):
        wide = [a if a.dtype == bool else a.astype(jnp.float32) for a in x]
        with jax.default_matmul_precision("highest"):
            want = jax.jit(within)(p, *wide)
        assert distance(got, want) <= 2e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(7, 40), (2, 33, 197), (128, 768), (3, 8192)], ids=str)
def test_rows(dtype, shape):
    """Rows as long as tiles are, and not, several of them in a program and one; what is left of them, and numbers."""

    def norm(p, x, y, gain):
        total = x + y * gain
        wide = total.astype(jnp.float32)
        mean, squares = wide.mean(-1, keepdims=True), jnp.square(wide).mean(-1, keepdims=True)
        normal = (wide - mean) * (lax.rsqrt(squares - jnp.square(mean) + 1e-6) * p["scale"]) + p["offset"]
        most = total.max(-1, keepdims=True)
        return normal.astype(x.dtype), jnp.sort(total, axis=0), most

    def tenant(i: int) -> tuple[Any, Any]:
        keys = jax.random.split(jax.random.key(i), 5)
        row = (*[1] * (len(shape) - 1), shape[-1])
        p = {name: jax.random.normal(key, row) for name, key in zip(("scale", "offset"), keys, strict=False)}
        x, y = (jax.random.normal(key, shape, dtype) for key in keys[2:4])
        return p, (x, y, jax.random.normal(keys[4], (*shape[:-1], 1), dtype))

    tenants = [tenant(i) for i in range(3)]
    programs = [coalesce.trace(norm, p, *x, name=f"t{i}") for i, (p, x) in enumerate(tenants)]
    fused = coalesce.fuse(programs)
    assert sum(isinstance(item, Rowwise) for item in items(fused.bundle.schedule)) == 1
    for (p, x), results in zip(tenants, fused([x for _, x in tenants]), strict=True):
        for got, want in zip(results, jax.jit(norm)(p, *x), strict=True):
            assert distance(got, want) <= (1e-2 if dtype == "bfloat16" else 2e-3 if dtype == "float16" else 1e-5)


def test_no_move_of_the_size_of_a_bank():
    """Weights go to the kernels as they lie."""
    model, params, inputs = setup("resnet18", "bfloat16")
    fused = fused_of(model, params, inputs, choose_kernel=indexed)
    largest = max(int(np.prod((len(a.rows), *a.shape))) for a in fused.bundle.arrays)
    assert moves_of_size(fused.as_text(), largest) == []


@pytest.mark.parametrize(
    "blocks", [Blocks(64, 64, 64, 4, 2), Blocks(64, 32, 64, 4, 3), Blocks(128, 64, 64, 8, 3)], ids=str
)
def test_chained_products(blocks):
    """A bottleneck with its shortcut and the next product, of odd sizes, against each product by itself."""
    relu = Epilogue(lambda y, bias: larger(y + bias, jnp.zeros_like(y)), (COLUMN,), jnp.bfloat16)
    total = Epilogue(lambda y, bias, other: larger(y + bias + other, jnp.zeros_like(y)), (COLUMN, WHOLE), jnp.bfloat16)
    dot = partial(lax.dot_general, dimension_numbers=(((3,), (0,)), ((), ())))
    conv = partial(
        lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    keys = iter(jax.random.split(jax.random.key(0), 20))
    slots = jnp.asarray([3, 0, 4])

    def link(call: Any, k: int, n: int, *window: int, inner: bool = False, epilogue: Any = relu) -> chained.Link:
        x, w = ((1, 13, 11, k), (*window, k, n))
        op = op_of(call, jax.ShapeDtypeStruct(x, jnp.bfloat16), jax.ShapeDtypeStruct(w, jnp.bfloat16))
        lhs = None if inner else jax.random.normal(next(keys), (3, 1, *x), jnp.bfloat16)
        bank = jax.vmap(indexed_gemm.layout(op))(jax.random.normal(next(keys), (5, *w), jnp.bfloat16) / 8)
        given = [Picked(jax.random.normal(next(keys), (5, n), jnp.bfloat16), slots)]
        rest = [None] if epilogue is total else []
        return chained.Link(op, lhs, Picked(bank, slots), epilogue, [*given, *rest])

    chain = [
        link(dot, 48, 128),
        link(conv, 64, 64, 3, 3),
        link(dot, 64, 128, inner=True, epilogue=total),
        link(dot, 128, 72, inner=True),
    ]

    for got, want in zip(jax.jit(lambda: chained.run(chain, blocks))(), jax.jit(lambda: in_turn(chain))(), strict=True):
        assert distance(got, want) <= 1e-2
