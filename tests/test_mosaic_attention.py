"""mosaic_attention: what it computes, interpreted, and what it leaves to the Triton kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import coalesce.compile as compile_module
from coalesce.kernels import attention, mosaic_attention
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


@pytest.fixture
def ran(monkeypatch) -> list[bool]:
    """Programs are for an H200, and its kernel is interpreted; what it runs is in the list, and whether it could."""
    found: list[bool] = []
    monkeypatch.setattr(compile_module, "default_tuned", lambda *_: Tuned(Database(), "NVIDIA H200"))
    supports = mosaic_attention.supports
    monkeypatch.setattr(mosaic_attention, "supports", lambda *given: found.append(supports(*given)) or found[-1])
    triton = attention.run

    def run(*given: Any) -> Any:
        return partial(mosaic_attention.run, interpreted=True)(*given) if found[-1] else triton(*given)

    monkeypatch.setattr(attention, "run", run)
    return found


@interprets
@pytest.mark.parametrize(
    ("time", "size", "dtype", "masked"),
    [(70, 64, jnp.bfloat16, True), (64, 128, jnp.float16, True), (133, 64, jnp.bfloat16, False)],
)
def test_what_each_tenant_computes(ran, time, size, dtype, masked):
    check(tenants(2, time, size, dtype, masked))
    assert ran == [True]


@interprets
def test_one_tenant(ran):
    check(tenants(1, 64))
    assert ran == [True]


@pytest.mark.parametrize(
    ("what", "changes"),
    [("32 bits", {"dtype": jnp.float32}), ("small heads", {"size": 32}), ("long rows", {"time": 257})],
)
def test_what_triton_runs(ran, what, changes):
    check(tenants(2, **{"time": 64, **changes}))
    assert ran == [False], what
