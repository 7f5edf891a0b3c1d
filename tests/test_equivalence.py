"""Random tenant programs: whatever is fused, each tenant gets what it would get alone.

Every property runs the compiled fused program. Examples are small, since their cost is XLA's compile: some 150 ms each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings, strategies as st

import coalesce
from coalesce.kernels import choose, KERNELS
from tests.compare import assert_as_good, assert_bitwise, assert_same
from tests.poison import Poison, poisons
from tests.program_control import models, reference, tenants
from tests.programs import Tenant

LOW = (jnp.bfloat16, jnp.float16)


@pytest.fixture(autouse=True, scope="module")
def cheap_compiles() -> Iterator[None]:
    """LLVM's optimisations are half of a compile; XLA's own passes, which decide what is computed, stay on."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def fuse(found: Sequence[Tenant], options: dict[str, Any]) -> coalesce.Fused:
    programs = [coalesce.trace(t.fn, t.params, *t.inputs, name=f"t{i}", shared=t.shared) for i, t in enumerate(found)]
    return coalesce.fuse(programs, **options)


def inputs_of(found: Sequence[Tenant]) -> list[tuple[Any, ...]]:
    return [t.inputs for t in found]


def alone(tenant: Tenant) -> Any:
    return jax.jit(tenant.model)(tenant.params, *tenant.inputs)


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


def check_equal(found: list[Tenant], options: dict[str, Any]) -> None:
    results = fuse(found, options)(inputs_of(found))
    for tenant, got in zip(found, results, strict=True):
        assert_same(got, alone(tenant), tenant.model.exact)


def check_precision(found: list[Tenant], options: dict[str, Any]) -> None:
    results = fuse(found, options)(inputs_of(found))
    for tenant, got in zip(found, results, strict=True):
        assert_as_good(got, alone(tenant), reference(tenant), tenant.model.exact)


def check_permuted(found: list[Tenant], order: list[int], options: dict[str, Any]) -> None:
    straight = fuse(found, options)(inputs_of(found))
    shuffled = [found[i] for i in order]
    for i, got in zip(order, fuse(shuffled, options)(inputs_of(shuffled)), strict=True):
        assert_same(got, straight[i], found[i].model.exact)


def check_isolated(found: list[Tenant], poison: Poison, options: dict[str, Any]) -> None:
    """Poison in inputs, then in weights: who has nothing of it gets the same bits from the same executable."""
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


small = models(max_ops=2)
low = models(max_ops=3, dtypes=LOW)
lanes = tenants(models(max_ops=3, dtypes=(jnp.float32, jnp.bfloat16)), max_families=2, min_lanes=2)


@st.composite
def permuted(draw: Any) -> dict[str, Any]:
    found = draw(tenants(small))
    return dict(found=found, order=draw(st.permutations(range(len(found)))), options=draw(OPTIONS))


@st.composite
def poisoned(draw: Any) -> dict[str, Any]:
    found = draw(lanes)
    return dict(found=found, poison=draw(poisons(found)), options=draw(OPTIONS))


def some(**parts: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(parts)


PROPERTIES = {
    "equal": (check_equal, some(found=tenants(), options=OPTIONS)),
    "precision": (check_precision, some(found=tenants(low), options=OPTIONS)),
    "permuted": (check_permuted, permuted()),
    "isolated": (check_isolated, poisoned()),
}
