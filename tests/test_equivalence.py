"""Random tenant programs: whatever is fused, each tenant gets what it would get alone.

Every property runs the compiled fused program. Examples are small, since their cost is XLA's compile: some 150 ms each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, strategies as st

import coalesce
from coalesce.kernels import choose, KERNELS
from tests.compare import assert_as_good, assert_bitwise, assert_same
from tests.poison import Poison, poisons
from tests.programs import without_llvm_optimisations
from tests.tenants import alone, in_float32, models, Tenant, tenants


@pytest.fixture(autouse=True, scope="module")
def cheap_compiles() -> Iterator[None]:
    with without_llvm_optimisations():
        yield


def fuse(found: Sequence[Tenant], options: dict[str, Any]) -> coalesce.Fused:
    programs = [coalesce.trace(t.fn, t.params, *t.inputs, name=f"t{i}", shared=t.shared) for i, t in enumerate(found)]
    return coalesce.fuse(programs, **options)


def inputs_of(found: Sequence[Tenant]) -> list[tuple[Any, ...]]:
    return [t.inputs for t in found]


def preferring(n: int | None) -> Any:
    """Kernel choice: the n-th kernel of those that support an op, counted round, or the library's own choice."""

    def choice(op: Any, groups: int, platform: str) -> str:
        able = [name for name, kernel in KERNELS.items() if kernel.supports(op)]
        return choose(op, groups, platform) if n is None else able[n % len(able)]

    return choice


OPTIONS = st.fixed_dictionaries(
    {
        "within_program": st.booleans(),
        "pack_unbounded_loops": st.booleans(),
        "choose_kernel": st.sampled_from([None, 0, 1, 2]).map(preferring),
    }
)


@st.composite
def cases(draw: Any, drawn: st.SearchStrategy[list[Tenant]], **more: Any) -> tuple[Any, ...]:
    """(tenants, options of fuse, what each function of `more` draws for these tenants)."""
    found = draw(drawn)
    return found, draw(OPTIONS), *(draw(strategy(found)) for strategy in more.values())


@given(cases(tenants(models(max_ops=5))))
def test_fused_equals_alone(case: tuple[list[Tenant], dict[str, Any]]) -> None:
    found, options = case
    results = fuse(found, options)(inputs_of(found))
    for tenant, got in zip(found, results, strict=True):
        assert_same(got, alone(tenant), tenant.model.exact)


@given(cases(tenants(models(max_ops=3, dtypes=(jnp.bfloat16, jnp.float16)), max_families=1)))
def test_low_precision_is_as_good_as_alone(case: tuple[list[Tenant], dict[str, Any]]) -> None:
    found, options = case
    results = fuse(found, options)(inputs_of(found))
    for tenant, got in zip(found, results, strict=True):
        assert_as_good(got, alone(tenant), alone(in_float32(tenant)), tenant.model.exact)


@given(cases(tenants(models(max_ops=2)), order=lambda found: st.permutations(range(len(found)))))
def test_permuting_tenants_permutes_results(case: tuple[list[Tenant], dict[str, Any], list[int]]) -> None:
    found, options, order = case
    straight = fuse(found, options)(inputs_of(found))
    shuffled = [found[i] for i in order]
    for i, got in zip(order, fuse(shuffled, options)(inputs_of(shuffled)), strict=True):
        assert_same(got, straight[i], found[i].model.exact)


lanes = tenants(models(max_ops=3, dtypes=(jnp.float32, jnp.bfloat16)), min_lanes=2)


@given(cases(lanes, poison=poisons))
def test_poison_stays_in_its_lane(case: tuple[list[Tenant], dict[str, Any], Poison]) -> None:
    """In inputs, then in a weight: whoever has nothing of it gets the same bits from the same executable."""
    found, options, poison = case
    program = fuse(found, options)
    clean = program(inputs_of(found))
    results = program(inputs_of(poison.in_inputs(found)))
    for i in set(range(len(found))) - {poison.tenant}:
        assert_bitwise(results[i], clean[i])
    bad, hit = poison.in_weights(found)
    if not hit:
        return
    other = fuse(bad, options)
    assert str(other) == str(program), "poison changed the plan"
    flat = program.compile()(list(other.bank), jax.tree.leaves(inputs_of(found)))
    results = jax.tree.unflatten(jax.tree.structure(clean), flat)
    for i in set(range(len(found))) - hit:
        assert_bitwise(results[i], clean[i])


PROPERTIES = (
    test_fused_equals_alone,
    test_low_precision_is_as_good_as_alone,
    test_permuting_tenants_permutes_results,
    test_poison_stays_in_its_lane,
)


@pytest.mark.slow
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_soak(check: Callable[[], None]) -> None:
    """The same with 2,000 examples each: `make soak` sets that profile."""
    check()
