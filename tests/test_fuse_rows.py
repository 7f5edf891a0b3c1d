"""fuse_rows: what is done to rows runs in one kernel, which computes what each tenant does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

from coalesce import jaxpr as J
from coalesce.bundle import Bundle, items, packs, Rowwise
from coalesce.bundle_check import check_bundle
from coalesce.costs import Costs, device_of
from coalesce.errors import IRError
from coalesce.html import html_page
from coalesce.kernels.rows import Rows
from coalesce.passes.choose_kernels import choose_kernels
from coalesce.passes.form_packs import form_packs
from coalesce.passes.fuse_rows import fuse_rows
from coalesce.serving.executable import executable_recipe
from coalesce.serving.schema import Options
from tests.alone import alone, array, check_fused, fuse_tenants, Tenant
from tests.bundles import bundle_of, replanned
from tests.compare import assert_as_good, assert_same, distance, norm as size
from tests.dataflow import check_plan
from tests.serving import fit_of, plain, serve

GPU: dict[str, Any] = {"platform": "gpu", "choose_kernel": lambda *op: "batched_dot", "policy": "never"}


def norm(x: Any, scale: Any, offset: Any) -> Any:
    """As flax's LayerNorm: by the mean and the mean of squares, in float32."""
    wide = x.astype(jnp.float32)
    mean, squares = wide.mean(-1, keepdims=True), jnp.square(wide).mean(-1, keepdims=True)
    factor = lax.rsqrt(jnp.maximum(squares - jnp.square(mean), 0.0) + 1e-6)
    return ((wide - mean) * (factor * scale) + offset).astype(x.dtype)


def layer(p: Any, x: Any) -> Any:
    """[rows, features] -> [rows, features], with a residual behind the norm."""
    y = norm(x + p["bias"][None], p["scale"][None], p["offset"][None])
    return y + y @ p["w"]


def layers(count: int, rows: int = 5, n: int = 48) -> list[Tenant]:
    def one() -> Tenant:
        shapes = {"bias": (n,), "scale": (n,), "offset": (n,), "w": (n, n)}
        return layer, {name: array(*shape) for name, shape in shapes.items()}, (array(rows, n),)

    return [one() for _ in range(count)]


def without_weights(fn: Callable[..., Any], *shapes: tuple[int, ...]) -> list[Tenant]:
    return [(lambda p, *xs: fn(*xs), {}, tuple(array(*shape) for shape in shapes)) for _ in range(2)]


def groups(bundle: Bundle) -> list[Rowwise]:
    return [item for item in items(bundle.schedule) if isinstance(item, Rowwise)]


def found(tenants: list[Tenant], **options: Any) -> int:
    """How many there are in a program that is right."""
    fused = check_fused(tenants, **{**GPU, **options})
    check_plan(fused.bundle, 0.0)
    return len(groups(fused.bundle))


def normed(x: Any) -> Any:
    """Without weights."""
    return norm(x, jnp.float32(2.0), jnp.float32(0.5))


def test_a_norm(golden):
    bundle = choose_kernels(form_packs(bundle_of(*layers(2))), platform="gpu", choice=lambda *_: "batched_dot")
    golden(replanned(partial(fuse_rows, platform="gpu"), bundle))


def test_it_is_one_kernel_on_a_gpu_and_none_on_a_cpu():
    assert found(layers(2)) == 1
    assert found(layers(1)) == 1
    assert not groups(fuse_tenants(layers(2), **{**GPU, "platform": "cpu"}).bundle)


@pytest.mark.once
def test_lanes_that_share_vectors():
    """All of them one, and some of them one."""
    own = layers(3)
    shared = {name: own[0][1][name] for name in ("scale", "offset")}
    assert found([(fn, {**p, **shared}, x) for fn, p, x in own]) == 1
    scale, w = own[0][1]["scale"], own[0][1]["w"]
    given = [own[0], (own[1][0], {**own[1][1], "scale": scale, "w": w}, own[1][2]), own[2]]
    assert found(given) == 1


@pytest.mark.once
def test_reductions_of_which_each_needs_the_one_before_are_left_to_xla():
    def by_variance(x):
        mean = x.mean(-1, keepdims=True)
        return (x - mean) * lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-6)

    def by_squares(x):
        return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)

    fns = (by_variance, by_squares, partial(jax.nn.softmax, axis=-1), partial(jax.nn.log_softmax, axis=-1))
    assert [found(without_weights(fn, (3, 40))) for fn in fns] == [0] * 4


@pytest.mark.once
def test_what_does_not_go_back_over_rows_stays():
    assert found(without_weights(lambda x: x.sum(-1) + jnp.square(x).sum(-1), (3, 40))) == 0


@pytest.mark.once
def test_rows_of_several_dimensions():
    """A vector for all, one for some of the rows, a number for each; and the norm of each head."""

    def run(x, scale, shift, gain):
        y = norm(x, scale, shift) * gain
        return norm(y.reshape(2, 5, 3, 32), jnp.float32(1.0), shift.reshape(1, 5, 3, 32))

    assert found(without_weights(run, (2, 5, 96), (1, 1, 96), (1, 5, 96), (2, 5, 1))) == 2


@pytest.mark.once
def test_what_others_read_is_left():
    """A sum before the norm, a number for each row, several results; a norm that reads another's."""

    def run(x, y):
        total = x + y
        mean, squares = total.mean(-1, keepdims=True), jnp.square(total).mean(-1, keepdims=True)
        normal = (total - mean) * lax.rsqrt(squares + 1.0)
        return jnp.sort(total, axis=0), squares[..., 0], jnp.sort(normal, axis=0), jnp.tanh(normal)

    assert found(without_weights(run, (6, 40), (6, 40))) == 1
    assert found(without_weights(lambda x: normed(x + jnp.sort(normed(x), axis=0)), (6, 40))) == 2
    assert found(without_weights(lambda x: normed(jnp.tanh(normed(x))), (6, 40))) == 1


def test_sums_of_what_is_written_anyway_go_along():
    """A residual of products, which XLA would add in a kernel of its own; what it sorts it also writes."""

    def residual(p, x):
        x = jnp.sort(x, axis=0)
        x = x + normed(x) @ p["a"]
        return x + normed(x) @ p["b"]

    tenants: list[Tenant] = [(residual, {name: array(32, 32) for name in "ab"}, (array(6, 32),)) for _ in range(2)]
    assert found(tenants) == 2
    first, second = (group.inside[0].eqn.primitive.name for group in groups(fuse_tenants(tenants, **GPU).bundle))
    assert (first, second) == ("reduce_sum", "add")


@pytest.mark.once
def test_what_is_made_behind_the_first_reduction_may_be_a_product_or_a_loop():
    def run(p, x, y):
        mean, squares = x.mean(-1, keepdims=True), jnp.square(x).mean(-1, keepdims=True)
        late = jnp.tanh(y) @ p if p.size else lax.fori_loop(0, 3, lambda i, y: jnp.sin(y), y)
        return (x - mean) * lax.rsqrt(squares + 1.0) + late

    for p in (array(40, 40), array(0)):
        assert found([(run, p, (array(5, 40), array(5, 40))) for _ in range(2)]) == 1


@pytest.mark.once
def test_what_is_wanted_before_the_rest_can_be_there_stays():
    """A product reads early what a reduction behind it is of; another group stands between a value and its reader."""

    def early(p, x, y):
        bent = jnp.tanh(x)
        z = jnp.sort(bent, axis=0) + y
        total = z * 2.0 + x
        mean, squares = total.mean(-1, keepdims=True), (bent * total).mean(-1, keepdims=True)
        return (total - mean) * squares + bent.sum(-1, keepdims=True)

    def between(p, x, y):
        first = normed(x)
        z = jnp.sort(first, axis=0) * first
        return normed(z) + first, normed(first + y)

    for fn in (early, between):
        check_fused([(fn, {}, (array(5, 40), array(5, 40))) for _ in range(2)], **GPU)


@pytest.mark.once
def test_extremes_and_what_is_no_number():
    def run(x):
        least, most = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        return jnp.where(x > 0.5 * (least + most), x - least, (x - most) / (1e-3 + most - least))

    (fn, p, (x,)), other = without_weights(run, (5, 33))
    assert found([(fn, p, (x.at[2, 3].set(jnp.nan),)), other]) == 1
    assert found([(fn, p, (x.at[2].set(jnp.inf),)), other]) == 1


@pytest.mark.once
def test_a_lane_of_no_numbers_changes_no_other():
    tenants = layers(3)
    fused, inputs = fuse_tenants(tenants, **GPU), [x for _, _, x in tenants]
    clean, dirty = fused(inputs), fused([inputs[0], (jnp.full_like(inputs[1][0], jnp.nan),), inputs[2]])
    assert np.isnan(dirty[1]).all()
    for lane in (0, 2):
        np.testing.assert_array_equal(dirty[lane], clean[lane])


def test_parts_and_spread_values_are_read_where_they_are():
    """Columns of a product, a vector of the input, numbers that stand for rows."""

    def run(p, x, shift):
        parts = x @ p
        left, right = parts[:, :40], parts[:, 40:]
        return norm(left, jnp.float32(1.0), jnp.broadcast_to(shift, (6, 40))) * right

    tenants: list[Tenant] = [(run, array(8, 80), (array(6, 8), array(40))) for _ in range(2)]
    assert found(tenants) == 1


@pytest.mark.once
def test_rows_that_nobody_wants_are_not_computed():
    """Of a network's last norm a head reads one; of two dimensions some rows in the middle."""

    def head(p, x, gain):
        y = norm(x * gain, jnp.float32(1.0), jnp.broadcast_to(p["b"], x.shape))
        return y[1:3, :2] @ p["w"]

    tenants: list[Tenant] = [
        (head, {"b": array(1, 7, 48), "w": array(48, 8)}, (array(4, 7, 48), array(4, 1, 1))) for _ in range(2)
    ]
    assert found(tenants) == 1
    (one,) = groups(fuse_tenants(tenants, **GPU).bundle)
    assert [J.shape(v) for v in one.results] == [(2, 2, 48)]
    both = without_weights(lambda x: (y := normed(x), jnp.sort(y[:2], axis=0)), (4, 40))
    assert found(both) == 1


@pytest.mark.once
def test_a_loop_that_is_one_wants_rows():
    def run(x):
        return lax.fori_loop(0, 3, lambda i, y: normed(jnp.sort(y, axis=0)), x)

    assert [found(without_weights(run, (rows, 32)), without=["unroll_loops"]) for rows in (4, 16)] == [0, 1]


@pytest.mark.once
def test_other_rows_stay():
    """Those that are short, those that are long, and columns."""

    def down(x):
        mean, squares = x.mean(0, keepdims=True), jnp.square(x).mean(0, keepdims=True)
        return (x - mean) * lax.rsqrt(squares + 1.0)

    assert [found(without_weights(normed, shape)) for shape in ((3, 31), (1, 8193))] == [0, 0]
    assert found(without_weights(down, (40, 40))) == 0


def test_what_is_multiplied_in_tf32_is_left_rounded():
    """By the packs that cut off the rest; as it is too, for who reads it otherwise."""
    by_tma = partial(fuse_tenants, platform="gpu", policy="never", choose_kernel=lambda *op: "mosaic_gemm")

    def alone_read(p, x):
        return norm(x, p["scale"][None], p["offset"][None]) @ p["w"]

    (one,) = groups((fused := by_tma(layers(2, 64, 64))).bundle)
    assert one.results == one.rounded and [pack.rounded for pack in packs(fused.bundle.schedule)] == [True]
    assert re.search(r"\n    then it leaves (%\d+)\n    then it leaves \1, rounded to TF32\n  pack 0 ", str(fused))
    (one,) = groups(by_tma([(alone_read, p, x) for _, p, x in layers(2, 64, 64)]).bundle)
    assert not one.results and len(one.rounded) == 1


@pytest.mark.once
def test_the_plan_says_so():
    fused = fuse_tenants(layers(2), **GPU)
    assert "\n  rows\n    f0: " in str(fused)
    assert "in a kernel on rows" in html_page(fused)


@pytest.mark.once
def test_a_bundle_with_one_that_is_wrong_is_broken():
    bundle = fuse_tenants(layers(2), **GPU).bundle
    (one,) = groups(bundle)
    late, nothing = replace(one, inside=one.inside[::-1]), replace(one, results=())
    for wrong, error in ((late, "runs before what it reads"), (nothing, "it leaves nothing")):
        with pytest.raises(IRError, match=error):
            check_bundle(replace(bundle, schedule=tuple(wrong if x is one else x for x in bundle.schedule)))


@settings(max_examples=8)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    n=st.integers(32, 140),
    lanes=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    own=st.booleans(),
    both=st.booleans(),
)
@pytest.mark.once
def test_it_computes_what_each_alone_does(sizes, n, lanes, dtype, own, both):
    """Whatever the rows, of which a program has some; in 16 bits as near to what is exact as each alone is."""

    def run(p, x, y):
        total = x + y
        normal = norm(total, p["scale"], p["offset"])
        return (normal, jnp.sort(total, axis=0)) if both else normal

    ones = [1] * len(sizes)
    shared = {"scale": array(*ones, n), "offset": array(*ones, n)}

    def tenant() -> Tenant:
        weights = {name: array(*ones, n) for name in shared} if own else shared
        return run, weights, tuple(array(*sizes, n).astype(dtype) for _ in range(2))

    tenants = [tenant() for _ in range(lanes)]
    if dtype == "float32":
        assert found(tenants) == 1
        return
    fused = fuse_tenants(tenants, **GPU)
    assert len(groups(fused.bundle)) == 1
    for (fn, p, xs), got in zip(tenants, fused([xs for _, _, xs in tenants]), strict=True):
        exact = alone((fn, p, tuple(x.astype(jnp.float32) for x in xs)))
        assert_as_good(got, alone((fn, p, xs)), exact, [False] * len(jax.tree.leaves(got)))


def test_tenants_in_a_bank():
    """Lanes read their vectors by slot, and no other row of the bank."""
    tenants = layers(3)
    options = Options("gpu", Costs(device_of("cpu")), choice=lambda *op: "batched_dot")
    serving = serve([fit_of(fn, p, x, name=f"t{i}") for i, (fn, p, x) in enumerate(tenants)], 5, options)
    recipe = executable_recipe([serving.lanes(2)], True)
    assert str(recipe.function.trace(*recipe.arguments).jaxpr).count("name=rows\n") == 1
    executable = serving.executable(2)
    for lanes in ([2, 0], [1, 2], [0, 0]):
        for i, got in zip(lanes, serving.call(executable, [(i, tenants[i][2]) for i in lanes]), strict=True):
            assert_same(got, plain(alone(tenants[i])))


@pytest.mark.once
def test_what_is_rounded_is_as_good_as_products_in_tf32():
    """And the residual beside it is exact: of zero weights nothing else is left."""
    own = layers(2, 64, 64)
    fused = fuse_tenants(own, platform="gpu", policy="never", choose_kernel=lambda *op: "mosaic_gemm")
    for tenant, got in zip(own, fused([x for _, _, x in own]), strict=True):
        want = alone(tenant)
        assert 1e-5 < distance(got, want) / size(want) < 1e-3
    (fn, p, x), other = own
    idle = fn, {**p, "w": jnp.zeros_like(p["w"])}, x
    fused = fuse_tenants([idle, other], platform="gpu", policy="never", choose_kernel=lambda *op: "mosaic_gemm")
    assert_same(fused([x, other[2]])[0], alone(idle))


@pytest.mark.once
@pytest.mark.parametrize(
    ("count", "n", "block"), [(128, 768, 1), (197, 512, 2), (7, 40, 8), (1, 64, 1), (4096, 32, 32), (9, 5000, 1)]
)
def test_rows_of_a_program(count, n, block):
    assert Rows((count,), n, lambda *_: []).block == block
