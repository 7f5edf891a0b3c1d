"""Recurrent cells and gated units as one kernel, on an NVIDIA GPU. Skipped elsewhere; run with `pytest -m gpu`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coalesce.models import by_name
from tests.test_cells import by_row, cells, gated
from tests.test_gpu import distance, fused_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),  # by JAX 0.11 and newer
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}


def recurrent(name: str, dtype: str, lanes: int, hidden: int) -> tuple[Any, list[Any], list[Any]]:
    model = by_name(name, dtype=dtype, param_dtype=dtype, hidden=hidden, features=hidden, steps=7, classes=40)
    keys = jax.random.split(jax.random.key(1), lanes)
    return model, [model.init(key) for key in keys], [model.example(key) for key in keys]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("lanes", "hidden"), [(1, 64), (3, 200), (8, 512)])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_step_is_one_kernel(name, lanes, hidden, dtype):
    """Against float32 at highest precision, in norm over all tenants."""
    with jax.default_matmul_precision("highest"):
        model, params, inputs = recurrent(name, dtype, lanes, hidden)
        fused = fused_of(model, params, inputs, choose_kernel=by_row)
        (pack,) = cells(fused.bundle)
        assert pack.kernel == "indexed_matvec" and len(pack.results) == (2 if name == "lstm" else 1)
        exact = recurrent(name, "float32", lanes, hidden)[0]
        whole = jax.tree.map(lambda x: x.astype(jnp.float32), (params, inputs))
        want = [exact.apply(p, *x) for p, x in zip(*whole, strict=True)]
        assert np.linalg.norm([*map(distance, fused(inputs), want)]) <= LIMITS[dtype] * lanes**0.5


def test_a_poisoned_lane_reaches_no_other():
    model, params, inputs = recurrent("lstm", "bfloat16", 4, 256)
    fused = fused_of(model, params, inputs)
    clean = [np.asarray(y) for y in fused(inputs)]
    bad = [*inputs[:2], (jnp.full_like(inputs[2][0], jnp.nan),), *inputs[3:]]
    dirty = [np.asarray(y) for y in fused(bad)]
    assert not np.isfinite(np.asarray(dirty[2], np.float32)).any()
    for lane in (0, 1, 3):
        assert dirty[lane].tobytes() == clean[lane].tobytes()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("kernel", "rows", "width"), [
    ("indexed_matvec", 1, 512), ("indexed_gemm", 1, 512), ("indexed_gemm", 5, 96), ("indexed_gemm", 70, 512),
])  # fmt: skip
def test_a_gated_unit(kernel, rows, width, dtype):
    tenants = gated(4, jax.nn.silu, rows, width, jnp.dtype(dtype))
    fn, inputs = tenants[0][0], [xs for _, _, xs in tenants]

    def layer(p: Any, x: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return fn(p, x)

    class Unit:
        apply = staticmethod(layer)

    fused = fused_of(Unit, [p for _, p, _ in tenants], inputs, choose_kernel=lambda *_: kernel)
    assert "then it leaves" in str(fused) or "= split" in str(fused)
    whole = [jax.tree.map(lambda x: x.astype(jnp.float32), tenant[1:]) for tenant in tenants]
    want = [jax.jit(layer)(p, *xs) for p, xs in whole]
    assert np.linalg.norm([*map(distance, fused(inputs), want)]) <= LIMITS[dtype] * 2
