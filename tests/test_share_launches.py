"""share_launches: independent packs of any shapes run in one kernel launch, and each tenant gets what it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

import coalesce
from coalesce.blocks import Blocks
from coalesce.bundle import Bundle, packs, units
from coalesce.bundle_check import check_bundle
from coalesce.compile import default_device
from coalesce.costs import Costs, device_of
from coalesce.errors import IRError
from coalesce.kernels import choose
from coalesce.measuring.case import cases
from coalesce.models import by_name
from coalesce.passes.choose_kernels import choose_kernels
from coalesce.passes.form_packs import form_packs
from coalesce.passes.fuse_epilogues import fuse_epilogues
from coalesce.passes.share_launches import share_launches
from coalesce.tuning import Database, Entry
from coalesce.weigh import can_launch
from tests.alone import array, check_fused, Tenant
from tests.bundles import bundle_of, replanned
from tests.cases import assert_each_as_alone, assert_inputs_isolated, assert_weights_isolated, case_of, fuse, inputs_of
from tests.dataflow import check_plan
from tests.heavy_cases import indexed
from tests.kin import draw_kin
from tests.programs import Draw, many_compiles
from tests.tenants import draw_tenants

COSTS = Costs(device_of("gpu"))
always = partial(share_launches, costs=COSTS, policy="always")


def dense(p, x):
    return lax.tanh(lax.dot(lax.tanh(lax.dot(x, p["a"])), p["b"]))


def convolved(p, x):
    y = lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return lax.max(y + p["b"].reshape(1, 1, 1, -1), 0.0)


DENSE = (dense, {"a": array(4, 8), "b": array(8, 3)}, (array(2, 4),))
CONVOLVED = (convolved, {"w": array(3, 3, 2, 4), "b": array(4)}, (array(1, 5, 5, 2),))


def planned(*tenants: Tenant, **options: Any) -> Bundle:
    return choose_kernels(form_packs(bundle_of(*tenants), **options), platform="cpu", choice=indexed)


def sizes(bundle: Bundle) -> list[int]:
    """Packs in each launch."""
    return [len(unit) for unit in units(packs(bundle.schedule))]


def test_two_programs(golden):
    golden(replanned(always, planned(DENSE, CONVOLVED)))


def test_programs_of_any_shapes_are_right():
    fused = check_fused(
        [DENSE, CONVOLVED, CONVOLVED], policy="always", launches=True, waste_bound=0.0, choose_kernel=indexed
    )
    assert sizes(fused.bundle) == [2, 1]
    report = fused.report
    assert (report.launches_shared, report.superkernels_across, report.ops_across, report.alone) == (1, 1, 3, 1)


def mixed(p, x, z):
    """Two products of different shapes; the sum of their results can only run after both."""
    return lax.tanh(lax.dot(x, p["a"])) + lax.dot(z, p["b"])


MIXED = (mixed, {"a": array(4, 6), "b": array(5, 6)}, (array(3, 4), array(3, 5)))


def test_ops_of_one_program_share_a_launch_if_asked():
    assert sizes(always(planned(MIXED, CONVOLVED))) == [2, 1]
    assert sizes(always(planned(MIXED, CONVOLVED, within_program=True), within_program=True)) == [3]
    check_fused([MIXED, CONVOLVED], policy="always", launches=True, choose_kernel=indexed, within_program=True)


def test_epilogues_read_nothing_of_their_launch():
    bundle = fuse_epilogues(always(planned(MIXED, within_program=True), within_program=True))
    assert [[step.eqn.primitive.name for step in pack.epilogue] for pack in packs(bundle.schedule)] == [["tanh"], []]
    assert check_plan(bundle, 0.0) is None


def test_inside_loops_that_run_as_one():
    """Their bodies are one scope, in which one product packs and the others have different shapes."""

    def scanned(p, x):
        def body(c, _):
            return lax.dot(lax.dot(lax.tanh(lax.dot(c, p["own"])), p["up"]), p["down"]), abs(c).sum()

        return lax.scan(body, x, None, 3)

    def weights(size):
        return {"own": array(4, 4), "up": array(4, size), "down": array(size, 4)}

    tenants = [(scanned, weights(size), (array(2, 4),)) for size in (3, 3, 17)]
    fused = check_fused(tenants, policy="always", launches=True, waste_bound=0.0, choose_kernel=indexed)
    assert (fused.report.loops_across, fused.report.launches_shared) == (1, 2)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_policy_auto_asks_the_cost_model(platform):
    """Where kernels are interpreted nothing wins; where they are not, ops that leave the device idle do."""
    bert, resnet = by_name("bert_small"), by_name("resnet18", image_size=64)
    programs = [
        coalesce.trace(m.apply, jax.eval_shape(m.init, jax.random.key(0)), *m.inputs(1), name=m.name)
        for m in (bert, resnet)
    ]
    fused = coalesce.fuse(programs, platform=platform, launches=True)
    assert (fused.report.launches_shared > 0) == (platform == "gpu")
    launched = [record.launched for record in fused.bundle.records.values() if record.launched is not None]
    assert all(times.gain_us > COSTS.margin * times.apart_us for times in launched)
    assert sum(len(unit) for unit in units(packs(fused.bundle.schedule)) if len(unit) > 1) == len(launched)
    if launched:
        assert str(launched[0]) in fused.explain()


def test_kernels_that_were_asked_for_stay():
    """Those of "auto" may change for a launch; those of a caller's own choice do not."""
    bundle = choose_kernels(form_packs(bundle_of(DENSE, CONVOLVED)), platform="gpu")
    by_rule, own = (partial(can_launch, choice=choice, platform="gpu") for choice in (choose, lambda *_: "separate"))
    assert share_launches(bundle, costs=COSTS, may_launch=own) is bundle
    shared = share_launches(bundle, costs=COSTS, may_launch=by_rule)
    assert {pack.kernel for unit in units(packs(shared.schedule)) if len(unit) > 1 for pack in unit} == {"indexed_gemm"}
    assert sizes(shared) == [2, 1]


def test_tuned_blocks_come_along():
    programs = [coalesce.trace(fn, p, *xs, name=fn.__name__) for fn, p, xs in (DENSE, CONVOLVED)]
    blocks = Blocks(32, 16, 16, 4, 2)
    found = cases(programs, default_device().device_kind)
    known = Database({case.key: Entry("indexed_gemm", 1.0, blocks) for case in found})
    fused = coalesce.fuse(programs, policy="always", launches=True, waste_bound=0.0, choose_kernel=indexed, tuned=known)
    assert sizes(fused.bundle) == [2, 1] and {pack.blocks for pack in packs(fused.bundle.schedule)} == {blocks}
    check_fused([DENSE, CONVOLVED], policy="always", launches=True, waste_bound=0.0, choose_kernel=indexed, tuned=known)


def test_one_program_or_other_kernels_have_nothing_to_share():
    for bundle in (planned(DENSE), choose_kernels(form_packs(bundle_of(DENSE, CONVOLVED)), platform="cpu")):
        assert always(bundle) is bundle


def test_a_launch_that_waits_for_itself_is_refused():
    bundle = planned(DENSE)
    first, tanh, second, last = bundle.schedule
    together = [replace(pack, launch=0) for pack in (first, second)]
    with pytest.raises(IRError, match="runs before what it reads"):
        check_bundle(replace(bundle, schedule=(together[0], together[1], tanh, last)))
    with pytest.raises(IRError, match="stand apart"):
        check_bundle(replace(bundle, schedule=(together[0], tanh, together[1], last)))


@pytest.fixture(scope="module")
def cheap_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with many_compiles(tmp_path_factory.mktemp("compiled")):
        yield


@settings(max_examples=max(5, settings().max_examples // 40))  # interpreted kernels take their time
@given(length=st.integers(1, 2), seed=st.integers(0, 2**64 - 1))
@pytest.mark.once
def test_each_tenant_gets_what_it_gets_alone(cheap_compiles: None, length: int, seed: int) -> None:
    pick = Draw(seed)
    dtype = pick.choice([jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16])
    draw = pick.choice([draw_kin, draw_tenants])
    found = draw(pick, length, 3, dtype)
    case = case_of(
        pick, found, choose_kernel=indexed, policy="always", launches=True, waste_bound=pick.choice([0.0, 0.4])
    )
    program = fuse(case.found, case.options)
    check_plan(program.bundle, case.options["waste_bound"])
    results = program(inputs_of(case.found))
    assert_each_as_alone(case.found, results, dtype)
    assert_inputs_isolated(case, program, results)
    assert_weights_isolated(case, program, results)
