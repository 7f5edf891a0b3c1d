"""Different programs that resemble each other, most of them fused with "always": each tenant gets what it gets alone.

As in tests/test_equivalence.py one executable serves all that can be asked of an example. The programs are edits of one
template (tests/kin.py), so that packs of every form, joint equations and joint loops occur: the last test counts them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import pytest
from hypothesis import given, strategies as st

from coalesce import jaxpr as J
from coalesce.bundle import JointLoop, JointStep, Pack
from tests.cases import assert_inputs_isolated, assert_weights_isolated, Case, case_of, fuse, fuse_to_read, inputs_of
from tests.compare import assert_as_good, assert_same
from tests.dataflow import all_of, check_plan
from tests.kin import draw_kin
from tests.programs import Draw, fewer, many_compiles
from tests.tenants import alone, in_float32


@pytest.fixture(autouse=True, scope="module")
def cheap_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with many_compiles(tmp_path_factory.mktemp("compiled")):
        yield


def kin_case(seed: int, layers: int, families: int, dtypes: Sequence[Any] = (jnp.float32,)) -> Case:
    pick = Draw(seed)
    found = draw_kin(pick, layers, pick.integer(2, families), pick.choice(dtypes))
    return case_of(pick, found, policy=pick.choice(["always", "always", "always", "auto"]))


@st.composite
def cases(draw: st.DrawFn, layers: int, families: int = 4, dtypes: Sequence[Any] = (jnp.float32,)) -> Case:
    """Hypothesis makes a failing example shorter, by the same seed."""
    return kin_case(draw(st.integers(0, 2**64 - 1)), draw(st.sampled_from(range(1, layers + 1))), families, dtypes)


@fewer(0.08)
@given(cases(layers=3))
def test_each_tenant_gets_what_it_gets_alone(case: Case) -> None:
    program = fuse(case.found, case.options)
    check_plan(program.bundle, case.options["waste_bound"])
    results = program(inputs_of(case.found))
    for tenant, got in zip(case.found, results, strict=True):
        assert_same(got, alone(tenant), tenant.model.exact)
    assert_inputs_isolated(case, program, results)
    assert_weights_isolated(case, program, results)


@fewer(0.07)
@given(cases(layers=2, families=2, dtypes=(jnp.bfloat16, jnp.float16)))
@pytest.mark.once
def test_low_precision_is_as_good_as_alone(case: Case) -> None:
    program = fuse(case.found, case.options)
    results = program(inputs_of(case.found))
    for tenant, got in zip(case.found, results, strict=True):
        assert_as_good(got, alone(tenant), alone(in_float32(tenant)), tenant.model.exact)
    assert_inputs_isolated(case, program, results)


@pytest.mark.once  # what is new in JAX shows above, and in tests/test_equivalence.py, which permutes too
@fewer(0.05)
@given(cases(layers=1, families=3))
def test_permuting_tenants_permutes_results(case: Case) -> None:
    found, options = case.found, case.options
    straight = fuse(found, options)(inputs_of(found))
    shuffled = [found[i] for i in case.order]
    for i, got in zip(case.order, fuse(shuffled, options)(inputs_of(shuffled)), strict=True):
        assert_same(got, straight[i], found[i].model.exact)


def plans(seeds: Sequence[int]) -> str:
    """Fuse the tenants of each seed."""
    found = [kin_case(seed, 1 + seed % 3, 4) for seed in seeds]
    return "\n\n".join(str(fuse_to_read(case.found, case.options)) for case in found)


@pytest.mark.once  # the hash seeds of one Python are enough
def test_one_plan_whatever_the_process() -> None:
    """No order of the compiler depends on addresses or on the hash seed, which is drawn for this one."""
    seeds = range(6)
    here = plans(seeds)
    assert here.startswith(plans(seeds[:3]))
    code = "from tests.test_across import plans; print(plans(range(6)))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    ran = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True)
    assert ran.stdout == here + "\n"


@pytest.mark.once  # the same seeds, and plans
def test_all_that_is_new_occurs() -> None:
    """Packs of all forms, joint equations and loops: so that the properties above are about something."""
    counts: Counter[str] = Counter()
    for seed in range(24):
        case = kin_case(seed, 3, 4)
        schedule = fuse_to_read(case.found, case.options | {"policy": "always"}).bundle.schedule
        counts.update(pack.form for pack in all_of(Pack, schedule) if len(pack.families) > 1)
        counts.update("joint step" for _ in all_of(JointStep, schedule))
        for loop in all_of(JointLoop, schedule):
            lengths = {J.as_scan(part.eqn).length for part in loop.parts}
            counts.update(["unequal loop" if len(lengths) > 1 else "equal loop", *["carry"] * len(loop.stacked)])
    least = {"equal": 10, "padded": 5, "product": 3, "joint step": 50, "equal loop": 1, "unequal loop": 1, "carry": 3}
    assert all(counts[what] >= n for what, n in least.items()), counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        test_each_tenant_gets_what_it_gets_alone,
        test_low_precision_is_as_good_as_alone,
        test_permuting_tenants_permutes_results,
    ],
)
def test_soak(check: Callable[[], None]) -> None:
    """The same with 2,000 examples each: `make soak` sets that profile."""
    check()
