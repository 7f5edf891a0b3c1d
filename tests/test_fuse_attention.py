"""fuse_attention: two products and the rows' work between them are one kernel, which computes what each tenant does."""

from __future__ import annotations

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

import coalesce
import coalesce.compile as compile_module
from coalesce.blocks import Blocks
from coalesce.bundle import Attention, Bundle, items, packs
from coalesce.bundle_check import check_bundle
from coalesce.costs import Costs, device_of
from coalesce.errors import IRError
from coalesce.heavy import heavy_op
from coalesce.kernels import attention
from coalesce.kernels.attention import fits
from coalesce.lower_attention import Reader
from coalesce.measuring.case import cases
from coalesce.models import by_name
from coalesce.passes.choose_kernels import choose_kernels
from coalesce.passes.form_packs import form_packs
from coalesce.passes.fuse_attention import fuse_attention
from coalesce.serving.executable import executable_recipe
from coalesce.serving.schema import Options
from coalesce.tuning import Database, Entry, Tuned
from tests.alone import alone, array, check_fused, fuse_tenants, Tenant
from tests.bundles import bundle_of, replanned
from tests.compare import assert_as_good, assert_same
from tests.dataflow import check_plan
from tests.serving import fit_of, plain, serve

BATCHED: dict[str, Any] = {"platform": "gpu", "choose_kernel": lambda *op: "batched_dot", "policy": "never"}


def softmax(q: Any, k: Any, v: Any) -> Any:
    """[heads, m, d], [heads, n, d], [heads, n, e] -> [heads, m, e]."""
    weights = jax.nn.softmax(jnp.einsum("hmd,hnd->hmn", q, k) * 0.5, axis=-1)
    return jnp.einsum("hmn,hne->hme", weights, v)


def layer(p: Any, x: Any) -> Any:
    """[time, features] -> [time, heads, size], by one product for queries, keys and values."""
    y = jnp.einsum("td,dchk->tchk", x, p["w"])
    q, k, v = (y[:, c] + p["b"][c][None] for c in range(3))
    weights = jax.nn.softmax(jnp.einsum("mhd,nhd->hmn", q / 2.0, k), axis=-1)
    return jnp.einsum("hmn,nhd->mhd", weights, v)


def two(fn: Callable[..., Any], *shapes: tuple[int, ...]) -> list[Tenant]:
    """Two tenants without weights."""
    return [(lambda p, *xs: fn(*xs), {}, tuple(array(*shape) for shape in shapes)) for _ in range(2)]


def attentions(bundle: Bundle) -> list[Attention]:
    return [item for item in items(bundle.schedule) if isinstance(item, Attention)]


def found(tenants: list[Tenant], **options: Any) -> int:
    """How many there are in a program that is right."""
    fused = check_fused(tenants, **{**BATCHED, **options})
    check_plan(fused.bundle, 0.0)
    return len(attentions(fused.bundle))


QKV = (3, 5, 4), (3, 6, 4), (3, 6, 2)


def test_a_softmax(golden):
    bundle = choose_kernels(form_packs(bundle_of(*two(softmax, *QKV))), platform="gpu", choice=lambda *_: "batched_dot")
    golden(replanned(partial(fuse_attention, platform="gpu"), bundle))


@pytest.mark.once
def test_it_is_one_kernel_on_a_gpu_and_none_on_a_cpu():
    assert found(two(softmax, *QKV)) == 1
    assert found(two(softmax, *QKV), platform="cpu") == 0


@pytest.mark.once
def test_one_tenant():
    assert found(two(softmax, *QKV)[:1]) == 1


@pytest.mark.once
def test_lanes_that_share_what_they_multiply():
    """Keys and values of all tenants, queries of each."""
    k, v = array(3, 6, 4), array(3, 6, 2)
    tenants = [(lambda p, q: softmax(q, p["k"], p["v"]), {"k": k, "v": v}, (array(3, 5, 4),)) for _ in range(3)]
    assert found(tenants) == 0  # products by weights
    by_input = [(lambda p, q: softmax(q, p["k"] * q[:, :1, :1], v), {"k": k}, (array(3, 5, 4),)) for _ in range(3)]
    assert found(by_input) == 0


def test_keys_that_weights_make():
    """The product of all three, its biases and the scale are read where they lie."""

    def tenant() -> Tenant:
        return layer, {"w": array(8, 3, 2, 4), "b": array(3, 2, 4)}, (array(7, 8),)

    assert found([tenant() for _ in range(3)]) == 1


def as_jax_has_it(p: Any, x: Any, keep: Any, **how: Any) -> Any:
    """[batch, time, features] -> [batch, time, heads, size]. Its scores have a dimension more, for groups of heads."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[i]) for i in range(3))
    return jax.nn.dot_product_attention(q, k, v, mask=keep, **how)


@pytest.mark.parametrize(
    ("batch", "how"),
    [(1, {}), pytest.param(2, {"is_causal": True}, marks=pytest.mark.once)],
)
def test_attention_as_jax_has_it(batch, how):
    def tenant() -> Tenant:
        return partial(as_jax_has_it, **how), array(3, 8, 2, 4), (array(batch, 7, 8), array(batch, 1, 1, 7) > 0)

    assert found([tenant() for _ in range(2)]) == 1


@pytest.mark.parametrize(("time", "causal"), [(7, True), pytest.param(1, False, marks=pytest.mark.once)])
def test_queries_that_share_keys(time, causal):
    """Four heads of queries and two of keys."""

    def apply(p: Any, x: Any, past: Any) -> Any:
        q = jnp.einsum("btd,dhk->bthk", x, p["q"])
        k, v = (jnp.einsum("btd,dhk->bthk", past, p[i]) for i in "kv")
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)

    def tenant() -> Tenant:
        params = {"q": array(8, 4, 4), "k": array(8, 2, 4), "v": array(8, 2, 4)}
        return apply, params, (array(2, time, 8), array(2, 9, 8))

    assert found([tenant() for _ in range(2)]) == 1


def test_attention_as_jax_has_it_in_16_bits():
    """Which asks by name for what tensor cores do with these."""
    tenants = [
        (
            as_jax_has_it,
            array(3, 8, 2, 4).astype(jnp.bfloat16),
            (array(1, 7, 8).astype(jnp.bfloat16), array(1, 1, 1, 7) > 0),
        )
        for _ in range(2)
    ]
    with jax.numpy_dtype_promotion("standard"):
        fused = fuse_tenants(tenants, **BATCHED)
        assert len(attentions(fused.bundle)) == 1
        for (fn, p, xs), got in zip(tenants, fused([xs for _, _, xs in tenants]), strict=True):
            exact = fn(p.astype(jnp.float32), xs[0].astype(jnp.float32), xs[1])
            assert_as_good(got, alone((fn, p, xs)), exact, [False])


@pytest.mark.parametrize(
    ("m", "n"), [(1, 6), pytest.param(5, 1, marks=pytest.mark.once), pytest.param(1, 1, marks=pytest.mark.once)]
)
def test_single_rows_and_columns(m, n):
    """Nothing says which of the dimensions of size one they are, once some were left out."""

    def apply(p: Any, q: Any, k: Any, v: Any) -> Any:
        weights = jax.nn.softmax(jnp.einsum("hmd,hnd->hmn", q, k).reshape(3, m * n), axis=-1)
        return jnp.einsum("hmn,hne->hme", weights.reshape(3, m, n), v)

    tenants = [(apply, {}, (array(3, m, 4), array(3, n, 4), array(3, n, 2))) for _ in range(2)]
    check_fused(tenants, **BATCHED)
    assert found(two(softmax, (3, m, 4), (3, n, 4), (3, n, 2))) == 1


def test_masks_and_biases():
    """Of each score, of each column, of all lanes, and numbers."""

    def masked(q, k, v, keep, bias):
        scores = jnp.einsum("hmd,hnd->hmn", q, k) + bias
        causal = jnp.tril(jnp.ones((5, 6), bool))
        scores = jnp.where(causal[None] & (keep > 0)[None, None], scores, -1e9)
        return jnp.einsum("hmn,hne->hme", jax.nn.softmax(scores, axis=-1), v)

    assert found(two(masked, *QKV, (6,), (1, 5, 6))) == 1


@pytest.mark.once
def test_rows_that_are_masked_as_a_whole_are_no_numbers():
    def masked(q, k, v, keep):
        scores = jnp.where(keep[None, :, None] > 0, jnp.einsum("hmd,hnd->hmn", q, k), -jnp.inf)
        return jnp.einsum("hmn,hne->hme", jax.nn.softmax(scores, axis=-1), v)

    tenants = two(masked, *QKV, (5,))
    assert found(tenants) == 1
    assert any(np.isnan(alone(tenant)).any() for tenant in tenants)


def test_what_is_no_number_stays_so():
    (fn, _, (q, k, v)), other = two(softmax, *QKV)
    assert found([(fn, {}, (q.at[1, 2, 0].set(jnp.nan), k, v)), other]) == 1
    assert found([(fn, {}, (q, k, v.at[0, 1].set(jnp.nan))), other]) == 1


@pytest.mark.once
def test_rows_without_a_softmax():
    def linear(q, k, v):
        scores = jnp.square(jnp.einsum("hmd,hnd->hmn", q, k))
        scores = scores / (1.0 + scores.sum(-1, keepdims=True)) - scores.min(-1, keepdims=True)
        return jnp.einsum("hmn,hne->hme", scores, v)

    def none(q, k, v):
        return jnp.einsum("hmn,hne->hme", jnp.einsum("hmd,hnd->hmn", q, k), v)

    assert found(two(linear, *QKV)) == 1
    assert found(two(none, *QKV)) == 1


def test_keys_made_by_more_than_moves():
    """Padding is made to nothing again, whatever it became: exp(0) is one."""

    def features(q, k, v):
        return softmax(jnp.exp(q), jnp.exp(k), jnp.log(jnp.square(v)))

    assert found(two(features, *QKV)) == 1


def test_numbers_that_stand_for_a_whole_row_or_column():
    """What is multiplied ends where it does, also if all of a row is one number; so does what is summed."""

    def spread(q, k, v):
        scores = jnp.einsum("hmd,hnd->hmn", jnp.broadcast_to(q, (3, 5, 4)), jnp.broadcast_to(k, (3, 16, 4)))
        largest = jnp.exp(0.1 * jnp.broadcast_to(scores.max(-1, keepdims=True), scores.shape))
        weights = largest / largest.sum(-1, keepdims=True) + scores
        return jnp.einsum("hmn,hne->hme", weights, v)

    assert found(two(spread, (3, 5, 1), (3, 16, 1), (3, 16, 2))) == 1


def test_infinite_values_that_all_rows_share():
    (fn, _, (q, k, _)), other = two(lambda q, k, v: softmax(q, k, jnp.broadcast_to(v, (3, 6, 2))), *QKV[:2], (3, 1, 2))
    assert found([(fn, {}, (q, k, jnp.full((3, 1, 2), jnp.inf))), other]) == 1


def test_what_is_made_of_much_is_read_as_it_is(monkeypatch):
    """Where each step reads the one before it twice, nobody looks at all of 2^12 ways."""
    leaves = []
    leaf = Reader.leaf
    monkeypatch.setattr(Reader, "leaf", lambda *own: leaves.append(own) or leaf(*own))

    def deep(q, k, v):
        for _ in range(12):
            q = q * jnp.sin(q)
        return softmax(q, k, v)

    assert found(two(deep, *QKV)) == 1
    assert len(leaves) < 50


@pytest.mark.once
def test_values_in_any_order_of_dimensions():
    def run(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("mhd,dnh->hmn", q, k), axis=-1)
        return jnp.einsum("hmn,enh->emh", weights, v).transpose(2, 0, 1)

    assert found(two(run, (5, 3, 4), (4, 6, 3), (2, 6, 3))) == 1


@pytest.mark.once
def test_one_that_reads_what_another_leaves():
    def run(q, k, v):
        return softmax(softmax(q, k, v), v, k)

    assert found(two(run, (3, 5, 4), (3, 6, 4), (3, 6, 4))) == 2


def test_steps_of_a_loop():
    def run(q, k, v):
        return lax.fori_loop(0, 3, lambda i, x: softmax(x, k, v), q)

    assert found(two(run, (3, 5, 4), (3, 6, 4), (3, 6, 4))) == 1


@pytest.mark.once
def test_scores_and_weights_that_somebody_reads_stay():
    def with_weights(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("hmd,hnd->hmn", q, k), axis=-1)
        return jnp.einsum("hmn,hne->hme", weights, v), weights

    def with_sum(q, k, v):
        scores = jnp.einsum("hmd,hnd->hmn", q, k)
        return jnp.einsum("hmn,hne->hme", jax.nn.softmax(scores, axis=-1), v) + scores.sum()

    assert found(two(with_weights, *QKV)) == 0
    assert found(two(with_sum, *QKV)) == 0


@pytest.mark.once
def test_work_that_mixes_rows_stays():
    def over_rows(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("hmd,hnd->hmn", q, k), axis=-2)
        return jnp.einsum("hmn,hne->hme", weights, v)

    def sorted_rows(q, k, v):
        weights = jnp.sort(jnp.einsum("hmd,hnd->hmn", q, k), axis=-1)
        return jnp.einsum("hmn,hne->hme", weights, v)

    def over_heads(q, k, v):
        weights = jnp.einsum("hmd,hnd->hmn", q, k)
        return jnp.einsum("hmn,gne->gme", jax.nn.softmax(weights, axis=-1), v).sum(0)

    assert [found(two(fn, *QKV)) for fn in (over_rows, sorted_rows, over_heads)] == [0, 0, 0]


@pytest.mark.once
def test_other_kernels_and_long_rows_stay():
    def chosen(op: Any, groups: int, platform: str) -> str:
        return "indexed_gemm"

    assert found(two(softmax, *QKV), choose_kernel=chosen) == 0
    assert found(two(softmax, (1, 2, 4), (1, 1030, 4), (1, 1030, 4))) == 0
    fused = fuse_tenants(two(softmax, *QKV), **BATCHED)
    (one,) = attentions(fused.bundle)
    assert fits(one.scores.op, 128) and not fits(replace(one.scores.op, n=2000), 64)
    assert not fits(replace(one.scores.op, n=1000, k=128), 128)


@pytest.mark.once
@pytest.mark.parametrize("kernel", ["indexed_gemm", "separate"])
def test_what_was_tuned_by_itself_runs_as_one_all_the_same(kernel, monkeypatch):
    programs = [coalesce.trace(fn, p, *xs, name=f"t{i}") for i, (fn, p, xs) in enumerate(two(softmax, *QKV))]
    entry = Entry(kernel, 1.0, Blocks(16, 16, 16) if kernel == "indexed_gemm" else None)
    tuned = Tuned(Database({case.key: entry for case in cases(programs, "a GPU", "gpu")}), "a GPU")
    monkeypatch.setattr(compile_module, "default_tuned", lambda *given: tuned)
    apart = coalesce.fuse(programs, platform="gpu", without=["fuse_attention"])
    assert [pack.kernel for pack in packs(apart.bundle.schedule)] == [kernel] * 2
    (one,) = attentions(coalesce.fuse(programs, platform="gpu").bundle)
    assert (one.scores.kernel, one.scores.blocks) == (one.values.kernel, one.values.blocks) == ("batched_dot", None)


@pytest.mark.once
@pytest.mark.parametrize(("rows", "block"), [(1, 16), (50, 64), (65, 32), (128, 64), (197, 32), (256, 64), (257, 32)])
def test_rows_of_a_program_pad_little(rows, block):
    struct = jax.ShapeDtypeStruct((rows, 64), jnp.bfloat16)
    (eqn,) = jax.make_jaxpr(lambda q, k: q @ k.T)(struct, struct).eqns[-1:]
    scores = heavy_op(eqn)
    assert attention.Attention(scores, scores, 64, lambda *_: None, ()).rows == block


def test_the_plan_says_so():
    fused = fuse_tenants(two(softmax, *QKV), **BATCHED)
    assert "\n  attention\n    pack 0 x2 dot" in str(fused)
    report = fused.report
    assert report.heavy_ops == 4 and report.superkernels == 2


@pytest.mark.once
def test_a_bundle_with_one_that_reads_too_late_is_broken():
    bundle = fuse_tenants(two(softmax, *QKV), **BATCHED).bundle
    (one,) = attentions(bundle)
    swapped = replace(one, rowwise=one.rowwise[::-1])
    with pytest.raises(IRError, match="runs before what it reads"):
        check_bundle(replace(bundle, schedule=tuple(swapped if item is one else item for item in bundle.schedule)))


# what is masked is asked for above too, in float32
@pytest.mark.parametrize(
    ("model", "dtype"), [pytest.param("bert_small", "float32", marks=pytest.mark.once), ("vit_ti16", "bfloat16")]
)
def test_networks(model, dtype):
    """In 16 bits as near to the network in float32 as each alone is."""
    small = {"layers": 1, "hidden": 32, "heads": 2}
    fields = small | ({"vocabulary": 50, "length": 24} if model == "bert_small" else {"image_size": 48})
    own = by_name(model, dtype=dtype, param_dtype=dtype, **fields)
    params = [own.init(jax.random.key(i)) for i in range(2)]
    inputs = [own.example(jax.random.key(i + 7)) for i in range(2)]
    programs = [
        coalesce.trace(own.apply, p, *x, name=f"t{i}") for i, (p, x) in enumerate(zip(params, inputs, strict=True))
    ]
    fused = coalesce.fuse(programs, tuned=False, platform="gpu", policy="never", choose_kernel=dots_by_xla)
    assert len(attentions(fused.bundle)) == 1
    for p, x, got in zip(params, inputs, fused(inputs), strict=True):
        want = jax.jit(own.apply)(p, *x)
        if dtype == "float32":
            assert_same(got, want)
        else:
            assert_as_good(got, want, exact_of(model, fields, p, x), [False])


def dots_by_xla(op: Any, groups: int, platform: str) -> str:
    return "batched_dot" if op.kind == "dot" else "conv_slices"


def exact_of(model: str, fields: Any, params: Any, inputs: Any) -> Any:
    wide = by_name(model, dtype="float32", param_dtype="float32", **fields)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, (params, inputs))
    return jax.jit(wide.apply)(widened[0], *widened[1])


@settings(max_examples=12)
@given(
    heads=st.lists(st.integers(1, 3), max_size=2),
    m=st.integers(1, 70),
    n=st.integers(2, 40),
    d=st.integers(2, 33),
    e=st.integers(1, 20),
    lanes=st.integers(1, 3),
    turned=st.booleans(),
    scaled=st.booleans(),
    data=st.data(),
)
def test_it_computes_what_each_alone_does(heads, m, n, d, e, lanes, turned, scaled, data):
    order = data.draw(st.permutations(range(len(heads) + 2)))

    def run(p, q, k, v, bias):
        scores = jnp.einsum("...md,...nd->...mn", q.transpose(np.argsort(order)), k)
        weights = jax.nn.softmax(scores * 0.3 + bias if scaled else scores, axis=-1)
        return jnp.einsum("...mn,...ne->...em" if turned else "...mn,...ne->...me", weights, v)

    def tenant() -> Tenant:
        sizes = [*heads, m, d]
        shapes = [sizes[i] for i in order], (*heads, n, d), (*heads, n, e), (*[1] * len(heads), 1, n)
        return run, {}, tuple(array(*shape) for shape in shapes)

    check_fused([tenant() for _ in range(lanes)], **BATCHED)


def test_tenants_in_a_bank():
    """Lanes read by slot what their queries, keys and values are made of."""

    tenants: list[Tenant] = [(layer, {"w": array(8, 3, 2, 4), "b": array(3, 2, 4)}, (array(7, 8),)) for _ in range(3)]
    options = Options("gpu", Costs(device_of("cpu")), choice=dots_by_xla)
    serving = serve([fit_of(fn, p, x, name=f"t{i}") for i, (fn, p, x) in enumerate(tenants)], 5, options)
    recipe = executable_recipe([serving.lanes(2)], True)
    assert str(recipe.function.trace(*recipe.arguments).jaxpr).count("name=superkernel2_attention") == 1
    executable = serving.executable(2)
    for lanes in ([2, 0], [1, 2], [0, 0]):
        for i, got in zip(lanes, serving.call(executable, [(i, tenants[i][2]) for i in lanes]), strict=True):
            assert_same(got, plain(alone(tenants[i])))
