"""Every kernel against the plain operation, run for each lane alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from coalesce.kernels import choose, KERNELS
from tests.compare import assert_as_good, assert_bitwise, assert_same
from tests.heavy_cases import Case, convs, dots
from tests.programs import kind_of, many_compiles


@pytest.fixture(autouse=True, scope="module")
def cheap_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with many_compiles(tmp_path_factory.mktemp("compiled")):
        yield


PALLAS = {"indexed_gemm", "indexed_matvec", "mosaic_gemm"}  # interpreted on a CPU, which takes its time
EXAMPLES = settings().max_examples
IS_SOAK = EXAMPLES > 200
seeds, poisons = st.integers(0, 99), st.sampled_from([np.nan, np.inf])


@settings(max_examples=max(8, EXAMPLES // (4 if IS_SOAK else 8)))  # each runs three kernels
@given(case=dots() | convs(), seed=seeds, poison=poisons)
def test_kernel_is_the_plain_operation_of_each_lane(case: Case, seed: int, poison: float) -> None:
    check(case, KERNELS.keys() - PALLAS, seed, poison)


@settings(max_examples=max(8, EXAMPLES // (8 if IS_SOAK else 12)))
@given(case=(dots() | convs()).filter(lambda case: not PALLAS.isdisjoint(case.kernels)), seed=seeds, poison=poisons)
def test_pallas_kernel_is_the_plain_operation_of_each_lane(case: Case, seed: int, poison: float) -> None:
    check(case, PALLAS, seed, poison)


def check(case: Case, names: Collection[str], seed: int, poison: float) -> None:
    """What each kernel computes, and that nothing of one lane reaches another."""
    lhs, rhs = map(np.array, case.data(seed))  # what NumPy does compiles nothing
    run = case.compiled(names)
    results, plain = run(lhs, rhs), jnp.asarray(case.plain(lhs, rhs))
    assert results, "no kernel supports the operation"
    for name, got in results.items():
        if lhs.dtype in (jnp.bfloat16, jnp.float16):
            with jax.enable_x64(True):  # where results are float32, float32 is no truth: it is a sum in another order
                call: Any = case.call
                exact = replace(case, call=partial(call, preferred_element_type=None))
                truth = exact.plain(lhs.astype(np.float64), rhs.astype(np.float64))
            assert_as_good({name: got}, {name: plain}, {name: truth}, [False])
        else:
            assert_same({name: got}, {name: plain})
    if kind_of(lhs) != "f":
        return
    g, r = seed % case.groups, seed % case.per_group
    bad_lhs, bad_rhs = lhs.copy(), rhs.copy()
    bad_lhs[g, r], bad_rhs[g] = poison, poison
    others = np.ones(lhs.shape[:2], bool)
    others[g, r] = False
    assert_bitwise(at(run(bad_lhs, rhs), others), at(results, others))
    others[g] = False
    assert_bitwise(at(run(lhs, bad_rhs), others), at(results, others))


def at(results: dict[str, Any], lanes: Any) -> dict[str, Any]:
    return {name: np.asarray(y)[lanes] for name, y in results.items()}


@given(case=dots() | convs(), platform=st.sampled_from(["cpu", "gpu", "cuda"]), groups=st.integers(1, 64))
def test_choice_supports_the_operation(case: Case, platform: str, groups: int) -> None:
    assert choose(case.op, groups, platform) in case.kernels
