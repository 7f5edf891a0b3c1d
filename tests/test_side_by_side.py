"""Families as branches of one CUDA graph: when they are, what is packed then, and what the compiler is told."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

import coalesce
from coalesce.bundle import Bundle, packs
from coalesce.costs import Costs, device_of
from coalesce.costs.beside import beside, MEET_US
from coalesce.costs.schedule import schedule_us
from coalesce.passes.align import align
from coalesce.passes.form_packs import form_packs
from coalesce.passes.pack import pack
from coalesce.passes.part_families import part_families
from coalesce.passes.side_by_side import CONCURRENT, options_of, side_by_side
from tests.alone import array, check_fused, fuse_tenants, Tenant
from tests.bundles import bundle_of, replanned

GPU = Costs(device_of("gpu"))
FREE = Costs(replace(GPU.device, dispatch_us=0.0, graph_us=0.0, margin=0.0))  # launches cost nothing


def mlp(p: Any, x: Any) -> Any:
    for w in p:
        x = x @ w
    return x


def layers(width: int, count: int, rows: int = 2) -> Tenant:
    return mlp, [array(width, width) for _ in range(count)], (array(rows, width),)


def formed(*tenants: Tenant) -> Bundle:
    return form_packs(bundle_of(*tenants))


def timed(bundle: Bundle, costs: Costs, us: dict[int, float]) -> Costs:
    """Where a product of a family takes so long."""
    ops = {m.family: (m.op.key, "batched_dot", m.width, 1) for p in packs(bundle.schedule) for m in p.members}
    return Costs(costs.device, {ops[f]: own for f, own in us.items()})


def planned(*sizes: tuple[int, int], rows: int = 64, fn: Any = mlp, **options: Any) -> coalesce.Fused:
    tenants = [
        coalesce.trace(
            fn,
            [jax.ShapeDtypeStruct((width, width), "float32")] * count,
            jax.ShapeDtypeStruct((rows, width), "float32"),
            name=f"{width} wide",
        )
        for width, count in sizes
    ]
    return coalesce.fuse(tenants, **{"platform": "gpu", "tuned": False, **options})


def test_what_runs_side_by_side(golden):
    golden(replanned(partial(side_by_side, platform="gpu", costs=FREE), formed(layers(8, 2), layers(40, 2))))


def test_the_longest_family_holds_a_round_up():
    """Of 3 x 10 and 2 x 40 us that leave most of the device idle. Two of one kernel each would fill it in turns too."""
    bundle = formed(layers(8, 3), layers(40, 2))
    costs = timed(bundle, FREE, {0: 10.0, 1: 40.0})
    found = beside(bundle.schedule, bundle.families, costs)
    assert (
        (found.chain_us, found.turns_us)
        == (80.0, 110.0)
        == (80.0, schedule_us(bundle.schedule, bundle.families, costs))
    )
    assert 0 < found.filled_us < 8 and 80.0 <= found.us < 80.5
    full = formed(layers(2048, 1, 2048), layers(4096, 1, 4096))
    both = beside(full.schedule, full.families, GPU)
    assert both.filled_us > 0.9 * both.turns_us == pytest.approx(0.9 * sum(both[2:]))
    assert both.us == both.turns_us


def test_families_wait_for_each_other_where_they_share_a_pack():
    """Two packs of both, of 50 us each, are as long as all; apart the products of the one hide behind the other's.
    Those that were apart before a pack take a moment to meet."""
    before = formed(layers(8, 2), layers(7, 2))
    shared = pack(align(before, costs=FREE, policy="always"))
    assert [len(item.families) for item in packs(shared.schedule)] == [2, 2]
    ops = {(item.op.key, "batched_dot", 2, 1): 50.0 for item in packs(shared.schedule)}
    costs = Costs(FREE.device, ops)
    found = beside(shared.schedule, shared.families, costs)
    assert found.chain_us == found.turns_us == 100.0
    apart = beside(before.schedule, before.families, timed(before, FREE, {0: 50.0, 1: 30.0}))
    assert (apart.chain_us, apart.turns_us) == (100.0, 160.0)
    once = replace(before, aligned=align(before, costs=FREE, policy="always").aligned[1:])
    met = pack(once)
    ops |= timed(before, FREE, {0: 50.0, 1: 30.0}).measured
    last = beside(met.schedule, met.families, Costs(FREE.device, ops))
    assert (last.chain_us, last.turns_us) == (50.0 + MEET_US + 50.0, 50.0 + 30.0 + 50.0)


def test_packs_that_hold_families_in_step_are_left_out():
    """Three products of 40 us and three of 30. As packs of 35 they stay; as packs of 50, which save 20 each, they would
    take 150 where the shorter family hides behind the longer one's 120."""
    before = align(formed(layers(8, 3), layers(7, 3)), costs=FREE, policy="always")
    key = next(iter(packs(pack(before).schedule))).op.key
    alone = timed(before, FREE, {0: 40.0, 1: 30.0}).measured

    def parted(packed_us: float, **options: Any) -> Bundle:
        costs = Costs(FREE.device, {**alone, (key, "batched_dot", 2, 1): packed_us})
        return part_families(before, **{"platform": "gpu", "costs": costs, **options})

    assert parted(35.0) is before and len(before.aligned) == 3
    assert parted(50.0).aligned == ()
    again = parted(50.0)
    assert part_families(again, platform="gpu", costs=FREE) is again
    reasons = [str(record) for record in parted(50.0).records.values()]
    assert len(reasons) == 6
    assert reasons[0].startswith(
        "could run with family 1 at 0, but its families are predicted to take 120 us a round side by side and 150 with "
    )
    assert parted(50.0, platform="cpu") is parted(50.0, wanted=False) is before


def test_packs_stay_where_another_family_has_all_run_in_turns():
    """One with a loop that is in no graph."""

    def looped(p: Any, x: Any) -> Any:
        return jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: mlp(p, c), x)

    def left(*others: Tenant, **options: Any) -> int:
        before = align(formed(layers(8, 3), layers(7, 3), *others), costs=FREE, policy="always")
        ops = timed(before, FREE, {0: 40.0, 1: 30.0}).measured
        key = next(iter(packs(pack(before).schedule))).op.key
        costs = Costs(FREE.device, {**ops, (key, "batched_dot", 2, 1): 50.0})
        return len(part_families(before, platform="gpu", costs=costs, **options).aligned)

    loop = looped, [array(200, 200)], (array(2, 200),)
    assert (left(), left(loop), left(loop, wanted=True)) == (0, 3, 0)


def test_what_launches_cost_keeps_packs():
    """Eight towers of tiny layers: side by side each would launch its own kernels."""
    sizes = [(width, 6) for width in (64, 60, 56, 52, 48, 44, 40, 36)]
    report = planned(*sizes, rows=2).report
    assert report.superkernels_across > 0 and report.side_by_side
    assert planned(*sizes, rows=2, policy="never").report.predicted_gain_us == 0.0


def test_what_is_captured_is_planned_for_the_device_alone():
    """A long and a short tower: their launches hide nothing, and cost nothing, once they are branches of one graph."""
    sizes = [(64, 6), (48, 24)]
    assert [planned(*sizes, captured=own).report.side_by_side for own in (False, True)] == [False, True]
    alike = planned((64, 6), (60, 12), captured=True).report  # whose packs take no longer than the longer of them
    assert (alike.superkernels_across, alike.components) == (6, 1)
    assert planned((4096, 12), (8192, 6), rows=4096, captured=True).report.executables == 1
    assert str(planned(*sizes, platform="cpu", captured=np.bool_(True))) == str(planned(*sizes, platform="cpu"))


def test_what_shares_a_kernel_is_no_branch_of_a_captured_graph():
    """Three products of 40 us and three of 30, the first two of which take 35 as one. XLA's graph has the others side
    by side behind it, 115 us in all; one that is captured has everything in turns, and rather shares nothing."""
    both = align(formed(layers(8, 3), layers(7, 3)), costs=FREE, policy="always")
    key = next(iter(packs(pack(both).schedule))).op.key
    alone = timed(both, FREE, {0: 40.0, 1: 30.0}).measured
    costs = Costs(FREE.device, {**alone, (key, "batched_dot", 2, 1): 35.0})
    before = replace(both, aligned=both.aligned[:1])
    assert part_families(before, platform="gpu", costs=costs) is before
    assert part_families(before, platform="gpu", costs=costs, captured=True).aligned == ()


def test_by_default_where_it_is_predicted_to_win():
    """Two towers whose kernels leave most of a GPU idle; not those that fill it, one alone, on a CPU, or in turns."""
    small = planned((512, 12), (1024, 12))
    report = small.report
    assert report.side_by_side and report.executables == 1 and report.components == 2
    assert str(report).endswith(", side by side")
    assert report.why_side_by_side.startswith("side by side: a round is predicted to take ")
    assert report.why_executables.startswith("side by side: one executable: the host takes ")
    assert report.why_side_by_side in small.explain()
    assert "\n  independent kernels run side by side\n" in str(small)
    large = planned((4096, 12), (8192, 6), rows=4096).report
    assert not large.side_by_side and large.why_side_by_side.startswith("one after the other: a round is predicted")
    others: list[dict[str, Any]] = [{"platform": "cpu"}, {"side_by_side": False}, {"executables": 2}]
    others.append({"without": ["side_by_side"]})
    for options in others:
        assert not planned((512, 12), (1024, 12), **options).report.side_by_side
    one = planned((512, 12)).report
    assert (one.side_by_side, one.why_side_by_side) == (False, "")
    assert planned((512, 12), side_by_side=True).report.side_by_side
    for wanted in (np.bool_(True), np.bool_(False)):
        assert planned((512, 1), side_by_side=wanted).report.side_by_side is bool(wanted)


def test_loops_run_in_turns():
    """Their kernels are part of no graph."""

    def looped(p: Any, x: Any) -> Any:
        return jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: mlp(p, c), x)

    report = planned((512, 2), (1024, 2), fn=looped).report
    assert not report.side_by_side
    assert report.why_side_by_side == "one after the other: some of it, such as a loop, is part of no CUDA graph"


def test_what_the_compiler_is_told(monkeypatch):
    """The caller's own options go first; XLA takes ours, and a fused program computes the same."""
    bundle = formed(layers(8, 1))
    assert options_of(bundle) is None and options_of(bundle, {"a": 1}) == {"a": 1}
    told = replace(bundle, beside=True)
    assert options_of(told) == CONCURRENT
    (name,) = CONCURRENT
    assert options_of(told, {name: "SERIALIZE", "a": 1}) == {name: "SERIALIZE", "a": 1}
    given: list[Any] = []
    for where in ("coalesce.fused", "coalesce.staged"):
        real = __import__(where, fromlist=["compile_parts"]).compile_parts
        monkeypatch.setattr(f"{where}.compile_parts", lambda *a, real=real: given.append(a[3]) or real(*a))
    found = [layers(8, 2), layers(5, 1)]
    for wanted in (True, False):
        fused = check_fused(found, platform="gpu", side_by_side=wanted, tuned=False, policy="never")
        staged = fused.staged()
        staged(staged.stage([x for *_, x in found]))
    assert given == [CONCURRENT, CONCURRENT, None, None]


def test_asked_for_what_cannot_be():
    with pytest.raises(coalesce.PlanError, match="side_by_side=True is one executable, and executables is 3"):
        fuse_tenants([layers(4, 1)], side_by_side=True, executables=3)
