"""mosaic_attention: what it computes, interpreted, and what it leaves to the Triton kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import coalesce.compile as compile_module
from coalesce.kernels import attention, mosaic_attention
from coalesce.lower import lower
from coalesce.tuning import Database, Tuned
from tests.alone import alone, array, fuse_tenants, Tenant
from tests.compare import assert_as_good
from tests.test_fuse_attention import BATCHED

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # by JAX 0.11 and newer
interprets = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.10 interprets no wgmma")


def layer(p: Any, x: Any, keep: Any, masked: bool = True) -> Any:
    """[time, features] -> [time, heads, size], as flax's attention."""
    y = jnp.einsum("td,dchk->tchk", x, p["w"]) + p["b"][None]
    q, k, v = (y[:, c] for c in range(3))
    scores = jnp.einsum("mhd,nhd->hmn", q / jnp.sqrt(q.shape[-1]).astype(q.dtype), k)
    if masked:
        scores = jnp.where(keep[None, None], scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("hmn,nhd->mhd", jax.nn.softmax(scores, axis=-1), v)


def tenants(count: int, time: int, size: int = 64, dtype: Any = jnp.bfloat16, masked: bool = True) -> list[Tenant]:
    def one() -> Tenant:
        params = {"w": array(16, 3, 2, size).astype(dtype), "b": array(3, 2, size).astype(dtype)}
        return partial(layer, masked=masked), params, (array(time, 16).astype(dtype), array(time) > -1.0)

    return [one() for _ in range(count)]


def check(own: list[Tenant]) -> None:
    """Each tenant's result is as near to what it computes in float32 as its own."""
    fused = fuse_tenants(own, **BATCHED)
    for tenant, got in zip(own, fused([xs for _, _, xs in own]), strict=True):
        fn, params, xs = tenant
        wide = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(jnp.float32), (params, xs))
        assert_as_good(got, alone(tenant), alone((fn, *wide)), [False])


def attend(scores: Any, v: Any) -> Any:
    """[heads, m, n], [n, heads, size] -> [m, heads, size]."""
    return jnp.einsum("hmn,nhd->mhd", jax.nn.softmax(scores, axis=-1), v)


def within(_: Any, y: Any, keep: Any, bias: Any) -> Any:
    """Queries, and keys and values of one head for all, out of one array; a mask and a bias of parts of others."""
    k, v = (jnp.broadcast_to(x, (len(y), 2, 64)) for x in (y[:, 2:3], y[:, 3:]))
    scores = jnp.einsum("mhd,nhd->hmn", y[:, :2], k) + bias[:, 1:2, 2 : 2 + len(y)]
    return attend(jnp.where(keep[:, :, : len(y)], scores, -1e4), v)


def negative(_: Any, q: Any, k: Any, v: Any) -> Any:
    """Times a number that is computed of numbers alone."""
    return attend(jnp.einsum("mhd,nhd->hmn", q, k) * -jnp.ones((1, 1, 1), q.dtype), v)


def floors(_: Any, q: Any, k: Any, v: Any) -> Any:
    return attend(jnp.floor(jnp.einsum("mhd,nhd->hmn", q, k)), v)


def beside_others(_: Any, y: Any) -> Any:
    """Of each head queries, keys, values and three numbers more."""
    q, k, v = (y[..., start : start + 64] for start in (0, 64, 128))
    return attend(jnp.einsum("hmd,hnd->hmn", q, k), v.transpose(1, 0, 2)) * y[..., 192:193].transpose(1, 0, 2)


def weightless(fn: Any, *shapes: tuple[int, ...]) -> list[Tenant]:
    return [(fn, {}, tuple(array(*shape).astype(jnp.bfloat16) for shape in shapes)) for _ in range(2)]


@pytest.fixture
def could(monkeypatch) -> list[bool]:
    """Programs are for an H200; whether its kernel can run what there is is in the list."""
    found: list[bool] = []
    monkeypatch.setattr(compile_module, "default_tuned", lambda *_: Tuned(Database(), "NVIDIA H200"))
    supports = mosaic_attention.supports
    monkeypatch.setattr(mosaic_attention, "supports", lambda *given: found.append(supports(*given)) or found[-1])
    return found


@pytest.fixture
def ran(could, monkeypatch) -> list[bool]:
    """What it can it does, interpreted."""
    triton = attention.run

    def run(*given: Any) -> Any:
        return partial(mosaic_attention.run, interpreted=True)(*given) if could[-1] else triton(*given)

    monkeypatch.setattr(attention, "run", run)
    return could


@interprets
@pytest.mark.parametrize(
    ("time", "size", "dtype", "masked"),
    [(70, 64, jnp.bfloat16, True), (64, 128, jnp.float16, True), (133, 64, jnp.bfloat16, False)],
)
def test_what_each_tenant_computes(ran, time, size, dtype, masked):
    check(tenants(2, time, size, dtype, masked))
    assert ran == [True]


@interprets
def test_as_jax_has_it(ran):
    """With scores in float32, which have dimensions of size one."""

    def apply(p: Any, x: Any, keep: Any) -> Any:
        q, k, v = (jnp.einsum("btd,dhk->bthk", x[None], p["w"][:, i]) + p["b"][i][None, None] for i in range(3))
        return jax.nn.dot_product_attention(q, k, v, mask=keep[None, None, None])

    with jax.numpy_dtype_promotion("standard"):
        check([(apply, params, xs) for _, params, xs in tenants(2, 70)])
    assert ran == [True]


@interprets
def test_one_tenant(ran):
    check(tenants(1, 64))
    assert ran == [True]


@interprets
def test_parts_of_arrays(ran):
    own = weightless(within, (40, 4, 64), (1, 1, 100), (1, 3, 44))
    check([(fn, p, (y, keep > -1, bias)) for fn, p, (y, keep, bias) in own])
    assert ran == [True]


def test_it_is_one_kernel_of_a_gpu_program(could):
    """Lowered on a machine without one, with rows that fill no whole tiles."""
    own = weightless(negative, *[(70, 2, 64)] * 3)
    function, inputs = lower(fuse_tenants(own, **BATCHED).bundle, "gpu"), [xs for _, _, xs in own]
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        text = jax.jit(function).trace([], inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert could == [True] and text.count("@mosaic_gpu") == 1 and "xla.gpu.triton" not in text


QKV = ((64, 2, 64),) * 3
TRITON = {
    "what its backend lacks": weightless(floors, *QKV),
    "rows that TMA cannot step over": weightless(beside_others, (2, 64, 195)),
}


@pytest.mark.parametrize("own", TRITON.values(), ids=TRITON)
def test_what_else_triton_runs(ran, own):
    check(own)
    assert ran == [False]


@pytest.mark.parametrize(
    ("what", "changes"),
    [("32 bits", {"dtype": jnp.float32}), ("small heads", {"size": 32}), ("long rows", {"time": 257})],
)
@pytest.mark.once
def test_what_triton_runs(ran, what, changes):
    check(tenants(2, **{"time": 64, **changes}))
    assert ran == [False], what
