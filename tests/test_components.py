"""Programs that know nothing of each other: which they are, how they are ordered, and what is cut between them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate, permutations
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings, strategies as st

import coalesce
from coalesce.bundle import equations, Pack, packs
from coalesce.bundle_check import check_bundle
from coalesce.chain import Chain
from coalesce.costs import Costs, device_of
from coalesce.passes.align import align
from coalesce.passes.components import best_order, components, connected, Families, Job
from coalesce.passes.cut_executables import cut_executables
from coalesce.passes.form_packs import form_packs
from coalesce.passes.pack import pack
from tests.alone import array, check_fused, fuse_tenants, Tenant
from tests.bundles import bundle_of, replanned
from tests.compare import assert_bitwise, assert_same

GPU = Costs(device_of("gpu"))
AT_ONCE = Costs(replace(GPU.device, dispatch_us=0.1, argument_us=0.0, graph_us=0.01))  # the device waits for no launch
FIRST = jax.__version_info__ < (0, 11)  # later ones fuse products with what is around them, which rounds otherwise


def mlp(p: Any, x: Any) -> Any:
    for w in p:
        x = jnp.tanh(x @ w)
    return x


def layers(width: int, count: int) -> Tenant:
    return mlp, [array(width, width) for _ in range(count)], (array(2, width),)


def test_a_component_is_moved_as_a_whole(golden):
    """Families 0 and 2 share packs, and family 1 is too wide for these. It would begin, but runs the shortest."""
    before = form_packs(bundle_of(layers(8, 2), layers(32, 3), layers(7, 2)))
    planned = pack(align(before, costs=GPU, policy="always"))
    apart = components(planned.schedule)
    assert [own.families for own in apart] == [(1,), (0, 2)]
    shared = [own.op.key for own in packs(planned.schedule) if own.families == (0, 2)]
    slow = Costs(AT_ONCE.device, {(key, "batched_dot", 2, 1): 900.0 for key in shared})
    golden(replanned(partial(cut_executables, platform="gpu", costs=slow, executables=2), planned))


@pytest.mark.once
@given(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple), max_size=9))
def test_connected(groups: list[Families]) -> None:
    """Against what can be reached step by step."""
    home = connected(groups)
    assert set(home) == {own for group in groups for own in group}
    for own, whole in home.items():
        seen, left = {own}, [own]
        while left:
            at = left.pop()
            near = {other for group in groups if at in group for other in group} - seen
            seen |= near
            left += near
        assert whole == tuple(sorted(seen))


def finished(jobs: list[Job]) -> float:
    """When the last has run: the host launches one after the other, and the device runs what is launched."""
    done = 0.0
    for launched, (_, run_us) in zip(accumulate(own.launch_us for own in jobs), jobs, strict=True):
        done = max(done, launched) + run_us
    return done


@pytest.mark.once
@given(st.lists(st.builds(Job, st.integers(1, 20), st.integers(1, 20)), max_size=6))
def test_no_other_order_is_better(jobs: list[Job]) -> None:
    order = best_order(jobs)
    assert sorted(order) == list(range(len(jobs)))
    best = min(finished(list(own)) for own in permutations(jobs))
    assert finished([jobs[i] for i in order]) == best


def test_jobs_that_are_alike_stay_in_order():
    jobs = [Job(5.0, 3.0), Job(1.0, 9.0), Job(5.0, 3.0), Job(1.0, 9.0), Job(1.0, 2.0)]
    assert best_order(jobs) == [1, 3, 4, 0, 2]


def few(examples: int) -> settings:
    return settings(max_examples=max(3, settings().max_examples * examples // 200))


@few(6)
@given(
    st.lists(st.tuples(st.sampled_from([4, 5, 9, 10, 24]), st.integers(1, 4)), min_size=2, max_size=5, unique=True),
    st.integers(2, 5),
    st.sampled_from(["always", "never"]),
)
def test_the_same_as_in_one(sizes: list[tuple[int, int]], executables: int, policy: str) -> None:
    found = [layers(*size) for size in sizes]
    requests = [x for *_, x in found]
    options: dict[str, Any] = {"policy": policy, "waste_bound": 0.5}
    parts, whole = (fuse_tenants(found, executables=n, **options) for n in (executables, 1))
    (assert_bitwise if FIRST else assert_same)(parts(requests), whole(requests))
    contiguous(parts)
    assert parts.report.components == len(components(whole.bundle.schedule))


def contiguous(fused: coalesce.Fused) -> None:
    """Whatever runs of a component runs before anything of the next, and packs are numbered as they run."""
    order = [f for item in fused.bundle.schedule for f, _ in equations(item)]
    home = {f: own.families for own in components(fused.bundle.schedule) for f in own.families}
    runs = [home[f] for i, f in enumerate(order) if not i or home[f] != home[order[i - 1]]]
    assert len(runs) == len(set(runs))
    assert [own.index for own in packs(fused.bundle.schedule)] == list(range(len([*packs(fused.bundle.schedule)])))


def test_an_executable_of_a_component_knows_nothing_of_others():
    """It takes its own weights and inputs, leaves its own results, and hands nothing on."""
    found = [layers(8, 2), layers(32, 2)]
    fused = check_fused(found, executables=2, policy="never", costs=AT_ONCE)
    chain = fused.compile()
    assert isinstance(chain, Chain)
    widths = [{x.shape[-1] for x in jax.tree.leaves(part.args_info)} for part in chain.executables]
    assert sorted(map(sorted, widths)) == [[8], [32]]
    assert [len(jax.tree.leaves(part.out_info)) for part in chain.executables] == [1, 1]
    assert all("alias={" not in part.as_text() for part in chain.executables)


def test_nothing_moves_in_a_program_of_one_executable():
    found = [layers(8, 2), layers(32, 2), layers(7, 2)]
    whole, by_default = (fuse_tenants(found, policy="always", **own) for own in ({"executables": 1}, {}))
    assert whole.report.executables == 1 and len(components(whole.bundle.schedule)) == whole.report.components == 2
    assert str(whole) == str(by_default)


def test_a_launch_keeps_families_together():
    bundle = fuse_tenants([layers(4, 1), layers(6, 1), layers(9, 1)], policy="never").bundle
    apart = components(bundle.schedule)
    assert [own.families for own in apart] == [(0,), (1,), (2,)]
    heavy = [item for item in bundle.schedule if isinstance(item, Pack)]
    assert len(heavy) == 3
    assert connected([(0,), (1, 0), (2,)]) == {0: (0, 1), 1: (0, 1), 2: (2,)}
    check_bundle(bundle)


def test_by_default_programs_that_share_no_kernel_are_cut_apart():
    """In turns, two long ones and a short one on a GPU: what runs longer than it is launched goes first, and nothing is
    live between. Many short ones are one graph, since a call would cost more than it hides."""

    def planned(*sizes: tuple[int, int]) -> coalesce.Fused:
        tenants = [
            coalesce.trace(
                mlp,
                [jax.ShapeDtypeStruct((width, width), "float32")] * count,
                jax.ShapeDtypeStruct((16, width), "float32"),
                name=f"{width} wide",
            )
            for width, count in sizes
        ]
        return coalesce.fuse(tenants, policy="never", platform="gpu", tuned=False, side_by_side=False)

    long = planned((64, 20), (8192, 5), (4096, 30))
    report = long.report
    assert (report.executables, report.components) == (len(long.bundle.starts), 3) and report.executables > 1
    first = [{f for f, _ in equations(item)} for item in long.bundle.schedule[: long.bundle.starts[1]]]
    assert {0} not in first
    assert "nothing is live between them. Without a kernel in common, one after the other: family " in (
        report.why_executables
    )
    assert report.why_executables in long.explain()
    short = planned(*((width, 6) for width in (32, 36, 40, 44, 48, 52, 56, 60)))
    assert short.report.executables == 1 and short.report.components == 8
    assert short.report.why_executables == (
        "one executable: the host takes 140 us for its 56 arguments and the launch of its 96 kernels"
    )


@pytest.mark.parametrize("how", ["jit", "vmap"])
def test_as_a_part_of_a_callers_program_it_is_one(how):
    found = [layers(8, 2), layers(32, 2)]
    requests = [x for *_, x in found]
    parts, whole = (fuse_tenants(found, policy="never", executables=n) for n in (2, 1))
    if how == "jit":
        assert_same(jax.jit(parts)(requests), whole(requests))
        return
    several = jnp.stack([requests[0][0]] * 2)
    rows = jax.vmap(lambda x: parts([(x,), requests[1]])[0])(several)
    assert_same(rows, jnp.stack([whole(requests)[0]] * 2))
