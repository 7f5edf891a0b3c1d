"""Random tenant programs: whatever is fused, each tenant gets what it would get alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, strategies as st

import coalesce
from coalesce.kernels import choose, KERNELS
from tests.compare import assert_as_good, assert_bitwise, assert_same
from tests.program_control import models, reference, tenants
from tests.programs import Tenant

# LLVM's optimisations take most of a compile; XLA's own, which decide what is computed, stay on.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def programs(found: list[Tenant]) -> list[coalesce.Program]:
    return [
        coalesce.trace(t.fn, t.params, *t.inputs, name=f"t{i}", shared=t.shared) for i, t in enumerate(found)
    ]


def fused(found: list[Tenant], **options: Any) -> coalesce.Fused:
    result = coalesce.fuse(programs(found), **options)
    result.compile(FAST_COMPILE)
    return result


def alone(tenant: Tenant) -> Any:
    call = jax.jit(tenant.model).lower(tenant.params, *tenant.inputs).compile(FAST_COMPILE)
    return call(tenant.params, *tenant.inputs)


def preferring(kernel: str | None) -> Any:
    """Kernel choice: the given kernel for every op that it supports, else the library's own."""

    def choice(op: Any, groups: int, platform: str) -> str:
        return kernel if kernel is not None and KERNELS[kernel].supports(op) else choose(op, groups, platform)

    return choice


OPTIONS = st.fixed_dictionaries(
    {
        "within_program": st.booleans(),
        "pack_unbounded_loops": st.booleans(),
        "choose_kernel": st.sampled_from([None, *KERNELS]).map(preferring),
    }
)


@pytest.fixture(autouse=True, scope="module")
def cheap_compiles() -> Iterator[None]:
    """LLVM's optimisations are most of a compile here; XLA's own passes, which decide what is computed, stay on."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def check_equal(found: list[Tenant], options: dict[str, Any]) -> None:
    results = fused(found, **options)(inputs_of(found))
    for tenant, got in zip(found, results, strict=True):
        assert_same(got, alone(tenant), tenant.model.exact)


def check_precision(found: list[Tenant], options: dict[str, Any]) -> None:
    results = fused(found, **options)(inputs_of(found))
    for tenant, got in zip(found, results, strict=True):
        assert_as_good(got, alone(tenant), reference(tenant), tenant.model.exact)


def check_permuted(found: list[Tenant], order: list[int], options: dict[str, Any]) -> None:
    straight = fused(found, **options)(inputs_of(found))
    shuffled = [found[i] for i in order]
    results = fused(shuffled, **options)(inputs_of(shuffled))
    for i, got in zip(order, results, strict=True):
        assert_same(got, straight[i], found[i].model.exact)


def check_isolated(found: list[Tenant], poison: Poison, options: dict[str, Any]) -> None:
    """Poison in inputs, then in weights: who has nothing of it gets the same bits from the same executable."""
    program = fused(found, **options)
    clean = program(inputs_of(found))
    bad = [poison.in_inputs(t) if i == poison.tenant else t for i, t in enumerate(found)]
    for i, got in enumerate(program(inputs_of(bad))):
        if i != poison.tenant:
            assert_bitwise(got, clean[i])
    bad, hit = poison.in_weights(found)
    if not hit:
        return
    other = coalesce.fuse(programs(bad), **options)
    assert str(other) == str(program), "poison changed the plan"
    results = run_with(program, other.bank, inputs_of(found))
    for i in set(range(len(found))) - hit:
        assert_bitwise(results[i], clean[i])


SAME = dict(found=tenants(), options=OPTIONS)
