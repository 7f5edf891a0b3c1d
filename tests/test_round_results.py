"""round_results: a result is rounded to TF32 where all who read it multiply it so, and nothing else is."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from coalesce.blocks import Blocks
from coalesce.bundle import Attention, Bundle, items, Pack, packs
from coalesce.costs import Costs, devices
from coalesce.heavy import HeavyOp
from coalesce.kernels import choose, mosaic_gemm
from coalesce.passes.choose_kernels import choose_kernels
from coalesce.passes.form_packs import form_packs
from coalesce.passes.fuse_attention import fuse_attention
from coalesce.passes.fuse_epilogues import fuse_epilogues
from coalesce.passes.round_results import round_results
from coalesce.tuning import Database, Entry, key_of, Tuned
from tests.alone import alone, array, fuse_tenants, Tenant
from tests.bundles import bundle_of, replanned
from tests.compare import distance, norm

COSTS = Costs(devices.H100)
IMAGE = (1, 6, 6, 64)


def by_tma(op: HeavyOp, groups: int, platform: str) -> str:
    return "mosaic_gemm" if mosaic_gemm.supports(op) and op.m > 1 else choose(op, groups, "gpu")


def conv(x: Any, w: Any, precision: Any = None) -> Any:
    y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision)
    return jnp.maximum(y, 0)


def pooled(x: Any) -> Any:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def chain(p, x):
    return conv(pooled(conv(conv(x, p[0]), p[1])), p[2])


def residual(p, x):
    y = conv(conv(x, p[0]), p[1]) + x
    return conv(y, p[2]) + y


def counted(p, x):
    y = conv(x, p[0])
    return conv(y, p[1]) + conv(y, p[2], "highest")


def with_a_head(p, x):
    """Of one row, which no kernel multiplies in TF32."""
    y = conv(x, p[0])
    return conv(y, p[1]), jnp.max(y, (1, 2)) @ p[2][0, 0]


def with_a_branch(p, x):
    """Depthwise: element by element, in float32."""
    y = conv(x, p[0])
    each = lax.conv_general_dilated(
        y,
        p[1][:, :, :1],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=y.shape[-1],
    )
    return conv(y, p[2]), each


def given_back(p, x):
    y = conv(x, p[0])
    return y, conv(y, p[1]) + conv(y, p[2])


def tenants(fn: Any, count: int = 2) -> list[Tenant]:
    sizes = ((1, 1, 64, 64), (3, 3, 64, 64), (1, 1, 64, 64))
    return [(fn, [array(*size) / 16 for size in sizes], (array(*IMAGE),)) for _ in range(count)]


def planned(*tenants: Tenant, choice: Any = by_tma, **tuned: Tuned) -> Bundle:
    bundle = form_packs(bundle_of(*tenants))
    return fuse_epilogues(choose_kernels(bundle, platform="gpu", choice=choice, **tuned))


def found(bundle: Bundle) -> list[tuple[bool, bool]]:
    """Of each pack, whether it rounds its result, and whether its operand comes rounded."""
    return [(pack.rounds, pack.rounded) for pack in packs(bundle.schedule)]


def test_a_chain_with_a_pool(golden):
    golden(replanned(partial(round_results, costs=COSTS, choice=by_tma), planned(*tenants(chain))))


READ = {
    chain: [(True, False), (True, True), (False, True)],
    residual: [(True, False), (False, True), (False, False)],  # what is added too keeps what it has
    counted: [(False, False), (False, False), (False, False)],
    with_a_head: [(False, False), (False, False), (False, False)],
    with_a_branch: [(False, False), (False, False), (False, False)],
    given_back: [(False, False), (False, False), (False, False)],
}


@pytest.mark.parametrize(("fn", "want"), READ.items(), ids=[fn.__name__ for fn in READ])
def test_who_reads_it_decides(fn, want):
    assert found(round_results(planned(*tenants(fn)), costs=COSTS, choice=by_tma)) == want


def attention(p, q, k, v):
    """[heads, rows, 32] each -> [rows, columns]."""
    weights = jax.nn.softmax(jnp.einsum("hmd,hnd->hmn", q, k), axis=-1)
    return jnp.einsum("mhd,hde->me", jnp.einsum("hmn,hnd->mhd", weights, v), p)


HEADS = (2, 64, 32)


def attending(count: int = 2) -> list[Tenant]:
    return [(attention, array(2, 32, 64) / 8, tuple(array(*HEADS) for _ in range(3))) for _ in range(count)]


def test_attention_rounds_its_result(golden):
    bundle = choose_kernels(form_packs(bundle_of(*attending())), platform="gpu", choice=by_tma)
    bundle = fuse_epilogues(fuse_attention(bundle, platform="gpu", choice=by_tma), choice=by_tma)
    golden(replanned(partial(round_results, costs=COSTS, choice=by_tma), bundle))


def test_what_attention_rounds_is_as_good_as_products_in_tf32():
    own = attending()
    fused = fuse_tenants(own, choose_kernel=by_tma, platform="gpu")
    (one,) = (item for item in items(fused.bundle.schedule) if isinstance(item, Attention))
    assert one.rounds
    for tenant, got in zip(own, fused([inputs for *_, inputs in own]), strict=True):
        want = alone(tenant)
        assert 1e-5 < distance(got, want) / norm(want) < 1e-3


def test_results_are_those_of_products_in_tf32():
    """As good as a GPU's own; and of less than float32, so that it is no other kernel's result that was looked at."""
    own = tenants(chain)
    fused = fuse_tenants(own, choose_kernel=by_tma)
    assert found(fused.bundle) == READ[chain]
    for tenant, got in zip(own, fused([inputs for *_, inputs in own]), strict=True):
        want = alone(tenant)
        assert 1e-5 < distance(got, want) / norm(want) < 1e-3


def test_nan_and_infinity_of_a_lane_stay_as_they_are():
    own = tenants(chain, 3)
    fused = fuse_tenants(own, choose_kernel=by_tma)
    inputs = [inputs for *_, inputs in own]
    clean = fused(inputs)
    for poison in (np.nan, np.inf):
        dirty = fused([inputs[0], (jnp.full(IMAGE, poison),), inputs[2]])
        assert not np.isfinite(dirty[1]).all()
        for lane in (0, 2):
            np.testing.assert_array_equal(dirty[lane], clean[lane])


def times(bundle: Bundle, by_tma_us: float, else_us: float, width: int = 2) -> Tuned:
    blocks = Blocks(64, 64, 32, 4, 3)
    tried = {f"mosaic_gemm {blocks}": by_tma_us, f"indexed_gemm {blocks}": else_us}
    entry = Entry("mosaic_gemm", by_tma_us, blocks, tried)
    return Tuned(Database({key_of(pack.op, width, 1, "a"): entry for pack in packs(bundle.schedule)}), "a")


@pytest.mark.parametrize(("else_us", "first"), [(10.5, "indexed_gemm"), (100.0, "mosaic_gemm")])
def test_what_would_have_to_be_rounded_before_runs_elsewhere_unless_that_costs_more(else_us, first):
    own = tenants(chain)
    tuned = times(form_packs(bundle_of(*own)), 10.0, else_us)
    bundle = round_results(planned(*own, choice=choose, tuned=tuned), costs=COSTS, tuned=tuned)
    assert [pack.kernel for pack in packs(bundle.schedule)] == [first, "mosaic_gemm", "mosaic_gemm"]
    (start, *others) = (pack for pack in packs(bundle.schedule))
    assert isinstance(start, Pack) and not start.rounded and all(pack.rounded for pack in others)
    assert all(pack.blocks == Blocks(64, 64, 32, 4, 3) for pack in packs(bundle.schedule))


@pytest.mark.parametrize(("else_us", "first"), [(21.0, "indexed_gemm"), (200.0, "mosaic_gemm")])
def test_what_was_measured_of_other_numbers_of_problems_says_so_too(else_us, first):
    """At 16 tenants, where 8 were measured, half of a ViT's products ran by a kernel that takes twice as long."""
    own = tenants(chain)
    tuned = times(form_packs(bundle_of(*own)), 20.0, else_us, width=4)
    bundle = round_results(planned(*own, choice=choose, tuned=tuned), costs=COSTS, tuned=tuned)
    assert [pack.kernel for pack in packs(bundle.schedule)] == [first, "mosaic_gemm", "mosaic_gemm"]


def test_where_nothing_is_cut_nothing_is_rounded():
    own = tenants(chain)
    bundle = planned(*own, choice=lambda op, groups, platform: "indexed_gemm")
    assert round_results(bundle, costs=COSTS) is bundle
