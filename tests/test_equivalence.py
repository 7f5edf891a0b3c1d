"""Random tenant programs: whatever is fused, each tenant gets what it would get alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


@given(found=tenants(), options=OPTIONS)
def test_fused_equals_alone(found: list[Tenant], options: dict[str, Any]) -> None:
    results = fused(found, **options)([t.inputs for t in found])
    for tenant, got in zip(found, results, strict=True):
        assert_same(got, alone(tenant), tenant.model.exact)
