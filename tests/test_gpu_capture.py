"""On an NVIDIA GPU: programs as CUDA graphs of our own. Skipped elsewhere; run with `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coalesce
from coalesce.errors import CaptureError
from coalesce.models import by_name
from tests.test_gpu import fused_of, setup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),  # by JAX 0.11 and newer
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


def other(x: jax.Array) -> jax.Array:
    """Another request; an index stays within its table, and of a mask something is left."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return 1.5 * x
    return jnp.where(x > 0, x - 1, x) if jnp.issubdtype(x.dtype, jnp.integer) else x.at[..., -1].set(False)


def near(got: Any, want: Any, within: float = 1e-5) -> None:
    """XLA times kernels to choose among them, so that two programs of one function may differ."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
        assert np.linalg.norm(g - w) <= within * np.linalg.norm(w)


@pytest.fixture(autouse=True, scope="module")
def highest():
    """So that results differ by the order of sums alone."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "bert_small", "lstm", "dlrm", "mlp"])
def test_a_graph_computes_what_a_call_does(name):
    check(name, "float32", 1e-5)


@pytest.mark.parametrize("name", ["resnet18", "vit_ti16", "gru"])
def test_and_so_it_does_in_bfloat16(name):
    check(name, "bfloat16", 2e-2)


def check(name: str, dtype: str, within: float) -> None:
    model, params, inputs = setup(name, dtype)
    staged = fused_of(model, params, inputs).staged()
    captured = staged.capture(inputs)
    others = [tuple(map(other, own)) for own in inputs]
    for requests in (inputs, others, inputs):
        near(captured(requests).results(), staged.unstage(staged(staged.stage(requests))), within)


def test_it_and_jax_leave_each_others_memory_alone():
    model, params, inputs = setup("resnet18", "float32")
    captured = fused_of(model, params, inputs).staged().capture(inputs)
    want = captured().results()
    x = jnp.ones((2048, 2048))
    y = x
    for _ in range(50):
        captured()
        y = (y @ x) / 2048
    assert jnp.all(y == 1)
    jax.tree.map(np.testing.assert_array_equal, captured.results(), want)


def test_two_graphs_share_what_they_compute_in():
    """And still each has its own results."""
    made = []
    for name in ("resnet18", "lstm"):
        model, params, inputs = setup(name, "float32")
        captured = fused_of(model, params, inputs).staged().capture(inputs)
        made.append((captured, captured().results()))
    for captured, _ in made * 5:
        captured()
    for captured, want in made:
        jax.tree.map(np.testing.assert_array_equal, captured.results(), want)


def test_families_run_side_by_side():
    both = [setup(name, "float32", 1) for name in ("lstm", "gru", "resnet18")]
    found = [coalesce.trace(m.apply, p[0], *x[0], name=f"t{i}") for i, (m, p, x) in enumerate(both)]
    fused = coalesce.fuse(found, side_by_side=True, policy="never")
    assert fused.bundle.beside
    requests = [inputs[0] for _, _, inputs in both]
    staged = fused.staged()
    captured = staged.capture(requests)
    want = staged.unstage(staged(staged.stage(requests)))
    for _ in range(20):
        captured()
    near(captured.results(), want)


def test_results_may_be_parts_of_one_array():
    """XLA would take the slices into the call that ends a capture."""
    both = [(by_name("mlp", width=width), width) for width in (64, 60, 56)]
    given = [(m, m.init(jax.random.key(w)), m.example(jax.random.key(w))) for m, w in both]
    found = [coalesce.trace(m.apply, p, *x, name=f"t{i}") for i, (m, p, x) in enumerate(given)]
    staged = coalesce.fuse(found, policy="always").staged()
    requests = [x for _, _, x in given]
    near(staged.capture(requests)().results(), staged.unstage(staged(staged.stage(requests))))


def test_results_may_be_inputs_or_one_thing_twice():
    x, p = jnp.arange(12.0).reshape(3, 4), jnp.ones((4, 4)) / 3
    functions = [lambda p, x: (jnp.tanh(x @ p), jnp.tanh(x @ p), jnp.arange(3)), lambda p, x: x]
    found = [coalesce.trace(fn, p, x, name=f"t{i}") for i, fn in enumerate(functions)]
    captured = coalesce.fuse(found, captured=True, side_by_side=True).staged().capture([(x,)] * 2)
    for y in (x, x + 1):
        near(captured([(y,)] * 2).results(), [fn(p, y) for fn in functions])


def test_what_looks_at_a_value_cannot_be_captured():
    def until(p: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda c: jnp.sum(c) < 1e4, lambda c: c @ p + 1, x)

    x = jnp.ones((2, 8))
    staged = coalesce.fuse([coalesce.trace(until, 1.1 * jnp.eye(8), x, name="a")]).staged()
    with pytest.raises(CaptureError, match="cannot be captured"):
        staged.capture([(x,)])
    model, params, inputs = setup("mlp", "float32")
    again = fused_of(model, params, inputs).staged()  # nothing is left capturing
    near(again.capture(inputs)().results(), again.unstage(again(again.stage(inputs))))


def test_its_memory_comes_back():
    device = jax.devices()[0]
    model, params, inputs = setup("mlp", "float32")
    staged = fused_of(model, params, inputs).staged()
    staged.capture(inputs)().block_until_ready()
    before = (device.memory_stats() or {})["bytes_in_use"]
    for _ in range(3):
        staged.capture(inputs)().block_until_ready()
    assert (device.memory_stats() or {})["bytes_in_use"] <= before
