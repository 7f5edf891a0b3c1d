"""fuse(without=...): each optional pass can be left out, alone and with others, and tenants get what they get alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, strategies as st
from jax import lax

import coalesce
from coalesce.compile import OPTIONAL_PASSES
from coalesce.costs import Costs, device_of
from coalesce.errors import PlanError
from coalesce.kernels import choose
from coalesce.models import by_name
from coalesce.passes.bundle_pipeline import bundle_passes
from coalesce.passes.pipeline import name_of, PROGRAM_PASSES
from tests.alone import array, check_fused, Tenant
from tests.cases import assert_each_as_alone, case_of, fuse, inputs_of
from tests.heavy_cases import indexed
from tests.programs import Draw, fewer, many_compiles
from tests.tenants import draw_tenants

SMALL: dict[str, dict[str, Any]] = {
    "bert_small": {"layers": 1, "vocabulary": 32, "length": 8},
    "lstm": {"layers": 1, "hidden": 16, "steps": 3},
}

MISSED = {
    "bert_small": {"fuse_attention", "fuse_epilogues", "fuse_rows", "hoist_weights", "merge_products", "join_arrays"},
    "lstm": {"fuse_epilogues", "lift_from_steps", "unroll_loops", "join_arrays"},
}


@pytest.fixture(autouse=True, scope="module")
def cheap_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with many_compiles(tmp_path_factory.mktemp("compiled")):
        yield


def towers(p: Any, x: jax.Array) -> jax.Array:
    """Products that read the same, weights that could be folded, a loop and what it does not need to do each time."""

    def body(c: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return lax.tanh(lax.dot(c, w) + lax.dot(x, p["in"])), None

    q, k = lax.dot(x, p["q"] * p["scale"]), lax.dot(x, p["k"])
    return lax.scan(body, lax.max(q, k), p["steps"])[0]


def tenants() -> list[Tenant]:
    def params(width: int) -> dict[str, jax.Array]:
        square = {name: array(width, width) for name in ("in", "q", "k")}
        return square | {"scale": array(width, width), "steps": array(3, width, width)}

    return [(towers, params(width), (array(2, width),)) for width in (4, 4, 5)]


@pytest.mark.parametrize("left_out", [*([name] for name in OPTIONAL_PASSES), list(OPTIONAL_PASSES)], ids="-".join)
@pytest.mark.once
def test_tenants_get_what_they_get_alone(left_out: list[str]) -> None:
    fused = check_fused(tenants(), without=left_out, launches=True, policy="always")
    ran = {step.name for step in fused.steps} | {step.name for made in fused._histories for step in made.steps}
    assert not ran & set(left_out)
    assert ran >= {"inline", "dce", "form_packs", "choose_kernels", "plan_layouts"}


@pytest.mark.once
@fewer(0.1)
@given(st.integers(0, 2**64 - 1), st.sets(st.sampled_from(OPTIONAL_PASSES), min_size=1))
def test_of_random_programs_too(seed: int, left_out: set[str]) -> None:
    pick = Draw(seed)
    case = case_of(pick, draw_tenants(pick, 3, 2, jnp.float32), without=sorted(left_out), launches=True)
    assert_each_as_alone(case.found, fuse(case.found, case.options)(inputs_of(case.found)), jnp.float32)


@pytest.mark.once
@pytest.mark.parametrize("name", SMALL)
def test_a_pass_that_is_left_out_is_missed(name: str) -> None:
    """Their effects: without a pass the plan is another, for some pass of each model."""
    model = by_name(name, **SMALL[name])
    programs = [
        coalesce.trace(m.apply, jax.eval_shape(m.init, jax.random.key(i)), *m.inputs(1), name=f"{i}")
        for i, m in enumerate([model] * 2)
    ]
    changed: set[str] = set()
    for choice in (choose, indexed):
        options: dict[str, Any] = {"platform": "gpu", "tuned": False, "choose_kernel": choice}
        whole = str(coalesce.fuse(programs, **options))
        changed |= {p for p in OPTIONAL_PASSES if str(coalesce.fuse(programs, without=[p], **options)) != whole}
    assert changed >= MISSED[name]


def test_what_cannot_be_left_out() -> None:
    one = coalesce.trace(lambda p, x: lax.dot(x, p), array(2, 2), array(2, 2), name="a")
    with pytest.raises(
        PlanError, match=r"without is \['inline'\]; a list of passes is wanted, of lift"
    ):
        coalesce.fuse([one], without=["inline"])
    with pytest.raises(PlanError, match="without is 'cse'; a list of passes"):
        coalesce.fuse([one], without="cse")


def test_all_of_them_are_passes() -> None:
    costs = Costs(device_of("cpu"))
    every = [*PROGRAM_PASSES, *bundle_passes(platform="cpu", costs=costs, launches=True)]
    assert set(OPTIONAL_PASSES) < set(map(name_of, every))
