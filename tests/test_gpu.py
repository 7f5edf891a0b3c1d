"""On an NVIDIA GPU: numerics, isolation and the compiled program. Skipped elsewhere; run with `pytest -m gpu`."""

import ctypes
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coalesce
from coalesce.bundle import packs
from coalesce.kernels import KERNELS
from coalesce.models import by_name
from coalesce.waiting import driver_of
from tests.hlo import moves_of_size, weights_written_again

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),  # by JAX 0.11 and newer
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

TENANTS = 4
MODELS = {
    "resnet18": {"image_size": 64},
    "resnet50": {"image_size": 64},
    "mobilenetv2": {"image_size": 64},
    "vit_ti16": {"image_size": 32},
    "bert_small": {},
    "lstm": {},
    "gru": {},
    "dlrm": {"max_rows": 100},
    "mlp": {},
}


def setup(name: str, dtype: str, tenants: int = TENANTS):
    model = by_name(name, dtype=jnp.dtype(dtype), **MODELS[name])
    params = [model.init(jax.random.key(i)) for i in range(tenants)]
    inputs = [model.example(jax.random.key(100 + i)) for i in range(tenants)]
    return model, params, inputs


def fused_of(model, params, inputs, **options) -> coalesce.Fused:
    pairs = zip(params, inputs, strict=True)
    return coalesce.fuse(
        [coalesce.trace(model.apply, p, *x, name=f"t{i}") for i, (p, x) in enumerate(pairs)], **options
    )


def own_result(apply, params, x):
    """A tenant's own, as its user gets it: autotuned, also where the process does without, for speed. Untuned, XLA's
    convolutions do not use TF32."""
    autotuned: Any = {"xla_gpu_autotune_level": 4}
    compiled = jax.jit(apply).lower(params, *x).compile(autotuned)
    return compiled(params, *x)


def distance(got, want) -> float:
    got, want = (np.asarray(jnp.asarray(v, jnp.float32), np.float64) for v in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("name", MODELS)
def test_float32_at_highest_precision_is_the_tenants_own(name):
    with jax.default_matmul_precision("highest"):
        model, params, inputs = setup(name, "float32")
        alone = [jax.jit(lambda p, x, m=model: m.apply(p, *x))(p, x) for p, x in zip(params, inputs, strict=True)]
        fused = fused_of(model, params, inputs)(inputs)
    for got, want in zip(fused, alone, strict=True):
        assert distance(got, want) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_lower_precision_is_as_good_as_the_tenants_own(name, dtype):
    """TF32 and bfloat16, in norm over all tenants, against float32 at highest precision.

    A product of one row is multiplied and added in float32 whatever the precision, so that a tenant's own error may be
    nothing at all; the fused program is then held to the float32 clause, 1e-5.
    """
    model, params, inputs = setup(name, dtype)
    reference, _, _ = setup(name, "float32", 0)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda p, x: reference.apply(p, *x))
        as_f32 = [jax.tree.map(widened, x) for x in inputs]
        exact = [run(p, x) for p, x in zip(params, as_f32, strict=True)]
    alone = [own_result(model.apply, p, x) for p, x in zip(params, inputs, strict=True)]
    fused = fused_of(model, params, inputs)(inputs)
    own_error = np.linalg.norm([distance(a, e) for a, e in zip(alone, exact, strict=True)])
    error = np.linalg.norm([distance(f, e) for f, e in zip(fused, exact, strict=True)])
    assert error <= max(1.5 * own_error, 1e-5)


def widened(x):
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


CONVOLUTIONS = [*product(["conv_slices", "conv_grouped", "separate"], ["resnet18"]), ("conv_taps", "mobilenetv2")]


@pytest.mark.parametrize(("kernel", "name"), CONVOLUTIONS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_lane_reaches_no_other(kernel, name, poison):
    model, params, inputs = setup(name, "float32")

    def choice(op, groups, platform):
        if op.kind == "conv":
            return kernel if KERNELS[kernel].supports(op) else "conv_slices"
        return "batched_dot"

    fused = fused_of(model, params, inputs, choose_kernel=choice)
    clean = [np.asarray(y) for y in fused(inputs)]
    again = [np.asarray(y) for y in fused(inputs)]
    bad = [*inputs[:2], (jnp.full_like(inputs[2][0], poison),), *inputs[3:]]
    dirty = [np.asarray(y) for y in fused(bad)]
    assert not np.isfinite(dirty[2]).all()
    for lane in (0, 1, 3):
        if np.array_equal(clean[lane], again[lane]):  # the contract is against a replay, wherever two agree
            np.testing.assert_array_equal(dirty[lane], clean[lane])
        else:
            assert distance(dirty[lane], clean[lane]) <= 1e-5


@pytest.mark.parametrize("name", ["mlp", "lstm", "gru", "dlrm"])
def test_no_move_of_the_size_of_a_weight(name):
    model, params, inputs = setup(name, "float32")
    fused = fused_of(model, params, inputs)
    largest = max(int(np.prod((len(a.rows), *a.shape))) for a in fused.bundle.arrays)
    assert moves_of_size(fused.as_text(), largest) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted({*MODELS} - {"dlrm"}))
def test_no_weight_is_written_again_in_a_call(name, dtype):
    assert weights_written_again(fused_of(*setup(name, dtype), executables=1)) == []


@pytest.mark.parametrize("name", ["vit_ti16", "bert_small", "gru"])
def test_weights_are_not_laid_side_by_side_in_a_call(name):
    """XLA does so with those of products that read one operand."""
    fused = fused_of(*setup(name, "bfloat16"))
    largest = max(int(np.prod(pack.op.rhs.shape)) for pack in packs(fused.bundle.schedule)) * TENANTS
    joined = [text for text in moves_of_size(fused.as_text(), largest // 2) if " concatenate(" in text]
    assert joined == []


def test_results_of_tenants_are_written_by_one_kernel():
    """XLA wraps each slice that is a kernel of its own."""
    apart = jax.jit(lambda x: [x[i] for i in range(len(x))]).lower(jnp.ones((4, 2000))).compile()
    assert "wrapped_slice" in (apart.as_text() or "")
    assert "wrapped_slice" not in fused_of(*setup("mlp", "float32")).as_text()


def test_a_single_tenant_runs_as_it_does_alone():
    with jax.default_matmul_precision("highest"):
        model, params, inputs = setup("resnet50", "float32", 1)
        alone = jax.jit(model.apply)(params[0], *inputs[0])
        (fused,) = fused_of(model, params, inputs)(inputs)
    assert distance(fused, alone) <= 1e-5


def test_several_executables_give_what_one_does():
    """Called again and again, with several rounds under way: what is handed on is each round's own."""
    model, params, inputs = setup("resnet50", "float32")
    with jax.default_matmul_precision("highest"):
        one, three = (fused_of(model, params, inputs, executables=n) for n in (1, 3))
        assert (one.report.executables, three.report.executables) == (1, 3)
        staged = three.staged()
        rounds = [[(jnp.roll(x, i),) for (x,) in inputs] for i in range(4)]
        wants, gots = [one(own) for own in rounds], [three(own) for own in rounds]
        stacks = [staged(staged.stage(own)) for own in rounds]
    for want, got, stack in zip(wants, gots, map(staged.unstage, stacks), strict=True):
        for a, b, c in zip(want, got, stack, strict=True):
            assert distance(b, a) <= 1e-5 and distance(c, a) <= 1e-5


ACROSS = {
    "residual networks": [("resnet18", {"image_size": 64}), ("resnet50", {"image_size": 64})],
    "transformers": [("bert_small", {"layers": 2}), ("bert_small", {"layers": 3, "hidden": 448, "heads": 7})],
    "recurrent networks": [("lstm", {"hidden": 128, "steps": 5}), ("lstm", {"hidden": 112, "steps": 7}), ("gru", {})],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ACROSS)
def test_across_families_is_as_good_as_alone(name, dtype):
    """In norm over all tenants of a set, as within a family; everything that is legal is packed."""
    models = [by_name(model, dtype=jnp.dtype(dtype), **options) for model, options in ACROSS[name]]
    exact = [by_name(model, **options) for model, options in ACROSS[name]]
    params = [m.init(jax.random.key(i)) for i, m in enumerate(models)]
    inputs = [m.example(jax.random.key(100 + i)) for i, m in enumerate(models)]
    with jax.default_matmul_precision("highest"):
        as_f32 = [jax.tree.map(widened, x) for x in inputs]
        want = [jax.jit(m.apply)(p, *x) for m, p, x in zip(exact, params, as_f32, strict=True)]
    alone = [own_result(m.apply, p, x) for m, p, x in zip(models, params, inputs, strict=True)]
    programs = [
        coalesce.trace(m.apply, p, *x, name=f"t{i}")
        for i, (m, p, x) in enumerate(zip(models, params, inputs, strict=True))
    ]
    fused = coalesce.fuse(programs, policy="always", waste_bound=0.6)
    assert fused.report.superkernels_across
    got = fused(inputs)
    own, packed = (max(map(distance, results, want)) for results in (alone, got))
    assert packed <= max(1.5 * own, 1e-5)


def test_families_side_by_side_give_what_they_give_in_turns():
    """Called again and again, with several rounds under way. What families compute on the way lies apart."""
    models = [by_name(model, **options) for model, options in ACROSS["residual networks"]]
    params = [m.init(jax.random.key(i)) for i, m in enumerate(models)]
    rounds = [[m.example(jax.random.key(100 * r + i)) for i, m in enumerate(models)] for r in range(4)]
    programs = [coalesce.trace(m.apply, p, *x, name=m.name) for m, p, x in zip(models, params, rounds[0], strict=True)]
    with jax.default_matmul_precision("highest"):
        turns, beside = (
            coalesce.fuse(programs, policy="never", executables=1, side_by_side=wanted) for wanted in (False, True)
        )
        wants, gots = [turns(own) for own in rounds], [beside(own) for own in rounds]
    for want, got in zip(wants, gots, strict=True):
        assert all(distance(b, a) <= 1e-5 for a, b in zip(want, got, strict=True))
    assert beside.memory_analysis().temp_size_in_bytes > turns.memory_analysis().temp_size_in_bytes


def test_across_families_a_lane_is_isolated():
    models = [by_name(model, **options) for model, options in ACROSS["residual networks"]]
    params = [m.init(jax.random.key(i)) for i, m in enumerate(models)]
    inputs = [m.example(jax.random.key(100 + i)) for i, m in enumerate(models)]
    programs = [coalesce.trace(m.apply, p, *x, name=m.name) for m, p, x in zip(models, params, inputs, strict=True)]
    fused = coalesce.fuse(programs, policy="always", waste_bound=0.6)
    clean = fused(inputs)
    bad = [tuple(jnp.full_like(x, jnp.nan) for x in inputs[0]), inputs[1]]
    np.testing.assert_array_equal(fused(bad)[1], clean[1])


@pytest.mark.parametrize("space", ["device", "pinned_host"])
def test_the_driver_knows_when_an_array_is_there(space: str) -> None:
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=space)
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, y: y @ y / 64, x), out_shardings=there)
    x = jax.random.uniform(jax.random.key(0), (2048, 2048))
    want = np.asarray(slow(x))
    y = slow(x)
    driver = driver_of(y)
    assert driver is not None and not y.is_ready()
    assert driver.wait([y]) == []
    np.testing.assert_array_equal(on_host_by_address(y) if space == "pinned_host" else np.asarray(y), want)


def on_host_by_address(y: jax.Array) -> np.ndarray:
    """Without JAX, which would wait."""
    memory: Any = (ctypes.c_uint8 * y.nbytes).from_address(y.unsafe_buffer_pointer())
    return np.frombuffer(memory, y.dtype).reshape(y.shape).copy()


def test_what_the_driver_cannot_follow_is_left_to_jax() -> None:
    keys, small = jax.random.split(jax.random.key(0), 4), jnp.ones(3, "int4")
    driver = driver_of(small)
    assert driver is not None and driver.wait([small]) == [small]
    assert driver_of(keys) is None
    coalesce.block_until_ready([keys, small])
