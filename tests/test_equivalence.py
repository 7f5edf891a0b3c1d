"""Random tenant programs: whatever is fused, each tenant gets what it would get alone.

Every property runs the compiled fused program. Compiling is what an example costs, so programs are small and one
executable is used for all that can be asked of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import pytest
from hypothesis import given, strategies as st

from tests.cases import assert_inputs_isolated, assert_weights_isolated, Case, case_of, fuse, inputs_of
from tests.compare import assert_as_good, assert_same
from tests.programs import Draw, fewer, many_compiles
from tests.tenants import alone, draw_tenants, in_float32


@pytest.fixture(autouse=True, scope="module")
def cheap_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with many_compiles(tmp_path_factory.mktemp("compiled")):
        yield


@st.composite
def cases(draw: st.DrawFn, ops: int, families: int = 2, dtypes: Sequence[Any] = (jnp.float32,)) -> Case:
    """Programs of up to that many ops: hypothesis makes a failing one shorter, by the same seed."""
    length, pick = draw(st.sampled_from(range(1, ops + 1))), Draw(draw(st.integers(0, 2**64 - 1)))
    found = draw_tenants(pick, length, pick.integer(1, families), pick.choice(dtypes))
    return case_of(pick, found)


@fewer(0.5)
@given(cases(ops=4), st.sampled_from([True, False, False]))
def test_each_tenant_gets_what_it_gets_alone(case: Case, permuted: bool) -> None:
    """And nothing else: isolation is tested here too, since what costs time is to compile the fused program. Permuting
    tenants permutes results: asked of a third, as it is a second program to compile."""
    program = fuse(case.found, case.options)
    results = program(inputs_of(case.found))
    for tenant, got in zip(case.found, results, strict=True):
        assert_same(got, alone(tenant), tenant.model.exact)
    assert_inputs_isolated(case, program, results)
    assert_weights_isolated(case, program, results)
    if not permuted:
        return
    shuffled = [case.found[i] for i in case.order]
    for i, got in zip(case.order, fuse(shuffled, case.options)(inputs_of(shuffled)), strict=True):
        assert_same(got, results[i], case.found[i].model.exact)


@fewer(0.3)
@given(cases(ops=2, families=1, dtypes=(jnp.bfloat16, jnp.float16)))
@pytest.mark.once
def test_low_precision_is_as_good_as_alone(case: Case) -> None:
    program = fuse(case.found, case.options)
    results = program(inputs_of(case.found))
    for tenant, got in zip(case.found, results, strict=True):
        assert_as_good(got, alone(tenant), alone(in_float32(tenant)), tenant.model.exact)
    assert_inputs_isolated(case, program, results)


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        test_each_tenant_gets_what_it_gets_alone,
        test_low_precision_is_as_good_as_alone,
    ],
)
def test_soak(check: Callable[[], None]) -> None:
    """The same with 2,000 examples each: `make soak` sets that profile."""
    check()
