"""Forms of kernels: of all platforms, where nobody knows which is lowered, and else of that one alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from coalesce.bank import default_device
from coalesce.kernels import indexed_gemm, mosaic_gemm
from coalesce.kernels.platforms import by_platform, LOWERED, lowered_for, only
from coalesce.serving.making import Jitted, make_here
from tests.mosaic_ops import dot

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # by JAX 0.11 and newer
interprets = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.10 traces no wgmma")
x = jnp.ones((2, 3))


def halves(x: Any) -> Any:
    return by_platform(x, cuda=jnp.sin, default=jnp.cos)


@pytest.mark.parametrize(("platform", "traced"), [
    ("cuda", {"sin"}), ("rocm", {"cos"}), ("cpu", {"cos"}), ("a platform to come", {"sin", "cos"}),
    (None, {"sin", "cos"}),
])  # fmt: skip
def test_one_form_is_traced_where_one_is_lowered(platform, traced):
    with only(platform) if platform else nullcontext():
        found = str(jax.make_jaxpr(lambda x: halves(x))(x))
    assert {name for name in ("sin", "cos") if f" {name} " in found} == traced
    assert lowered_for.get() is None


def test_the_default_device_is_lowered_for():
    """Whose kernels run interpreted, and nothing is compiled for a GPU beside."""
    assert default_device().client.platform in LOWERED
    seen: list[str | None] = []

    def noted(x: Any) -> Any:
        seen.append(lowered_for.get())
        return halves(x)

    compiled = make_here(lambda: Jitted(jax.jit(noted), (jax.ShapeDtypeStruct((2, 3), jnp.float32),)))
    assert seen == [default_device().client.platform]
    expected = jnp.sin(x) if seen == ["cuda"] else jnp.cos(x)
    np.testing.assert_array_equal(compiled(x), expected)


@pytest.mark.parametrize(("kernel", "by_triton"), [
    pytest.param(indexed_gemm, 1, id="by slot"), pytest.param(mosaic_gemm, 0, id="by TMA", marks=interprets),
])  # fmt: skip
def test_a_kernel_in_its_one_form_computes_the_same(kernel, by_triton):
    """Triton's is called once, if it is what runs there, where there are several calls if nobody knows."""
    op = dot(70, 64, 64)
    rng = np.random.default_rng(0)
    lhs, rhs = (jnp.asarray(rng.normal(size=(1, 2, *own.shape)), own.dtype) for own in (op.lhs, op.rhs))
    laid = jax.vmap(kernel.layout(op))(rhs[:, 0])

    def traced() -> Any:
        return jax.make_jaxpr(lambda x, w: kernel.run(op, x, w))(lhs, laid)

    everywhere = traced()
    with only("cpu"):
        here = traced()
    with only("cuda"):
        there = traced()
    calls = [str(own).count("pallas_call[") for own in (here, there, everywhere)]
    assert calls[:2] == [1, by_triton] and calls[2] >= 3
    assert [str(own).count("interpret=True") for own in (here, there)] == [1, 0]
    results = [jax.jit(jax.extend.core.jaxpr_as_fun(own))(lhs, laid) for own in (here, everywhere)]
    np.testing.assert_array_equal(*results)
