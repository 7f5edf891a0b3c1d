"""join_arrays: arrays side by side in slabs, where every reader can read them there."""

from __future__ import annotations

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import pytest

import coalesce
from coalesce.bundle import arguments, Array
from coalesce.layout import AS_IS
from coalesce.passes import join_arrays as passes
from coalesce.passes.choose_kernels import choose_kernels
from coalesce.passes.form_packs import form_packs
from coalesce.passes.fuse_epilogues import fuse_epilogues
from coalesce.passes.join_arrays import join_arrays
from coalesce.passes.plan_layouts import plan_layouts
from tests.alone import array, check_fused
from tests.bundles import bundle_of, replanned
from tests.heavy_cases import indexed


def net(p, x):
    for w, b in p["layers"]:
        x = jnp.maximum(x @ w + b[None], 0)
    return x * p["scale"][None]


def tenant(width=24, head=None):
    layers = [(array(8, width), array(width)), (array(width, 40), array(40))]
    last = (array(40, 8) if head is None else head, array(8))
    return net, {"layers": [*layers, last], "scale": array(8)}, (array(4, 8),)


def planned(*tenants, choice=indexed):
    bundle = choose_kernels(form_packs(bundle_of(*tenants)), platform="cpu", choice=choice)
    return plan_layouts(fuse_epilogues(bundle))


def test_weights_of_one_dtype_are_one_argument(golden):
    golden(replanned(partial(join_arrays, platform="cpu"), planned(tenant(), tenant())))


def test_a_program_for_a_cpu_keeps_its_arguments():
    bundle = planned(tenant(), tenant(), choice=lambda op, groups, platform: "batched_dot")
    assert join_arrays(bundle, platform="cpu") is bundle


def test_what_a_library_reads_stays_apart():
    """cuBLAS takes an operand from the start of an array; biases and scales are small enough to slice."""
    bundle = planned(tenant(), tenant(), choice=lambda op, groups, platform: "batched_dot")
    (slab,) = join_arrays(bundle, platform="gpu").slabs
    assert sorted(prod(bundle.arrays[i].shape) for i in slab.arrays) == [8, 8, 24, 40]


def test_large_rows_are_not_sliced(monkeypatch):
    bundle = planned(tenant(), tenant(), choice=lambda op, groups, platform: "batched_dot")
    monkeypatch.setattr(passes, "SMALL_ROW", 100)
    (slab,) = join_arrays(bundle, platform="gpu").slabs
    assert sorted(prod(bundle.arrays[i].shape) for i in slab.arrays) == [8, 8, 24]


@pytest.mark.parametrize(("most", "expected"), [(1000, [[8, 8], [40, 40]]), (64, [[8, 8]])])
def test_what_much_is_read_of_lies_in_smaller_slabs(monkeypatch, most, expected):
    """XLA slices it in a kernel of its own otherwise. Of 40 elements 1,280 bytes are read, of 8 elements 256."""
    library = planned(*[tenant(width=40)] * 2, choice=lambda op, groups, platform: "batched_dot")
    monkeypatch.setattr(passes, "SLICED", ((256, passes.LARGEST), (2**63, most)))

    def sizes(bundle):
        slabs = join_arrays(bundle, platform="gpu").slabs
        return sorted(sorted(prod(bundle.arrays[i].shape) for i in slab.arrays) for slab in slabs)

    assert sizes(library) == expected
    assert len(sizes(planned(*[tenant(width=40)] * 2))) == 1  # in their epilogues kernels read where it lies


def test_a_slab_holds_arrays_of_the_same_tenants_alone():
    head = array(40, 8)
    bundle = join_arrays(planned(tenant(head=head), tenant(head=head)), platform="cpu")
    rows = {tuple(t for t, _ in bundle.arrays[i].rows) for slab in bundle.slabs for i in slab.arrays}
    assert rows == {(0, 1)}
    assert [slab.arrays for slab in arguments(bundle) if len(bundle.arrays[slab.arrays[0]].rows) == 1] == [
        (next(i for i, a in enumerate(bundle.arrays) if len(a.rows) == 1),)
    ]


def test_no_row_is_longer_than_can_be_addressed(monkeypatch):
    monkeypatch.setattr(passes, "LONGEST_ROW", 1200)
    bundle = join_arrays(planned(tenant(), tenant()), platform="cpu")
    (slab,) = bundle.slabs  # the two largest have no room in it, nor in one of their own
    assert slab.arrays == (0, 1, 2, 3, 4)
    assert slab.size <= 1200
    ends = [start + prod(bundle.arrays[i].shape) for i, start in zip(slab.arrays, slab.starts, strict=True)]
    assert all(end <= start for end, start in zip(ends, [*slab.starts[1:], slab.size], strict=True))


@pytest.mark.parametrize("tenants", [
    [tenant(), tenant()],
    [tenant()],
    [tenant(), tenant(32), tenant(), tenant(32)],  # two families, whose lanes take turns
    [tenant(head=array(40, 8))] * 2,  # every weight is shared
], ids=["two", "one", "families", "shared"])  # fmt: skip
@pytest.mark.once
def test_each_tenant_gets_its_own_weights(tenants):
    fused = check_fused(tenants, choose_kernel=indexed, policy="never")
    assert fused.bundle.slabs


def test_a_loop_over_weights_in_a_slab():
    """Small enough to slice, and stacked for all steps of a scan."""

    def deep(p, x):
        return jax.lax.scan(lambda y, layer: (jnp.tanh(y @ layer["w"] + layer["b"][None]), None), x, p)[0]

    tenants = [(deep, {"w": array(5, 8, 8), "b": array(5, 8)}, (array(2, 8),)) for _ in range(3)]
    fused = check_fused(tenants, platform="gpu")
    assert fused.bundle.slabs


def test_no_slab_needs_64_bits_to_address(monkeypatch):
    monkeypatch.setattr(passes, "LARGEST", 2 * 4 * 1400)  # two rows of float32
    bundle = join_arrays(planned(tenant(), tenant()), platform="cpu")
    assert bundle.slabs and all(slab.size <= 1400 for slab in bundle.slabs)


def test_a_call_has_few_arguments():
    programs = [coalesce.trace(fn, p, *x, name=f"t{i}") for i, (fn, p, x) in enumerate([tenant(), tenant()])]
    fused = coalesce.fuse(programs, choose_kernel=indexed)
    assert len(fused.bundle.arrays) == 7
    assert [a.shape for a in fused.bank] == [(2, sum(-(-s // 32) * 32 for s in (8 * 24, 24, 24 * 40, 40, 320, 8, 8)))]


def slabs(dtype, shapes):
    arrays = [Array(((0, i),), shape, dtype, (AS_IS,)) for i, shape in enumerate(shapes)]
    return list(passes.side_by_side(arrays, range(len(shapes)), 1 << 30))


def test_weights_are_rows_of_their_slab():
    """TMA reads it as [rows, .., columns], of 16 bits in tiles of eight: from a multiple of such a tile on, to one that
    all of the slab's weights have in common."""
    (slab,) = slabs("bfloat16", [(64, 192), (24,), (8, 40), (128, 128)])
    assert slab.starts == (0, 64 * 192, 64 * 192 + 64, 13 * 1024)
    assert slab.size == 10 * 8 * 384  # the first multiple of 8 rows of both 192 and 128 columns that holds 128 x 128
    (slab,) = slabs("float32", [(64, 192), (24,), (8, 40), (128, 128)])
    assert slab.starts == (0, 64 * 192, 64 * 192 + 32, 64 * 192 + 384)
    assert slab.size == 76 * 384


def test_an_odd_width_has_a_slab_of_its_own():
    """Else the slab would end at a multiple of what it has in common with all the others, or TMA could read none."""
    common, odd = slabs("bfloat16", [(64, 192), (64, 30464), (128, 128), (24,), (32, 30464)])
    assert common.arrays == (0, 2, 3) and odd.arrays == (1, 4)
    assert odd.starts == (0, 64 * 30464) and odd.size == 96 * 30464
