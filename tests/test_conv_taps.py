"""conv_taps: depthwise convolutions of any rank, against the convolution of each lane alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

from coalesce.kernels import choose, conv_taps
from tests.heavy_cases import Case, FLOATS, LAST, WIDE
from tests.programs import Aval, many_compiles, readable
from tests.test_kernels import check, poisons, seeds


@pytest.fixture(autouse=True, scope="module")
def cheap_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with many_compiles(tmp_path_factory.mktemp("compiled")):
        yield


def depthwise(size, kernel, channels, strides, padding, dilation, filters=1, n=1, dtype=jnp.float32, **more) -> Case:
    call = partial(
        lax.conv_general_dilated, window_strides=strides, padding=padding, rhs_dilation=dilation,
        dimension_numbers=LAST[len(size)], feature_group_count=channels, precision="highest", **more,
    )  # fmt: skip
    return Case(call, Aval((n, *size, channels), dtype), Aval((*kernel, 1, channels * filters), dtype), 2, 2)


@st.composite
def cases(draw: Any) -> Case:
    rank = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    size, kernel, dilation = each(1, 6), each(1, 3), each(1, 2)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    if draw(st.booleans()):  # as large as the operand; the padding on one side may be negative
        before = each(-1, 3)
        strides, padding = (1,) * rank, [(lo, r - 1 - lo) for lo, r in zip(before, reach, strict=True)]
    else:
        lo, hi, strides = each(-1, 3), each(-1, 3), each(1, 3)
        padding = [(a, b + max(0, r - s - a - b)) for a, b, r, s in zip(lo, hi, reach, size, strict=True)]
    dtype = draw(st.sampled_from(FLOATS))
    wide = WIDE[dtype] if draw(st.booleans()) else None
    spread = {"lhs_dilation": each(1, 2)} if draw(st.integers(0, 3)) == 0 else {}
    channels, filters, n = draw(st.integers(2, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    return depthwise(
        size, kernel, channels, strides, readable(padding), dilation, filters, n, dtype,
        preferred_element_type=wide, **spread,
    )  # fmt: skip


@settings(max_examples=max(5, settings().max_examples // 8))
@given(case=cases(), seed=seeds, poison=poisons)
def test_is_the_convolution_of_each_lane_alone(case: Case, seed: int, poison: float) -> None:
    assert case.kernels.count("conv_taps") == 1
    check(case, {"conv_taps"}, seed, poison)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_an_infinite_weight_is_not_multiplied_by_padding(strides: tuple[int, int], bad: float) -> None:
    """Only the results that read the operand through that weight are no numbers."""
    case = depthwise((4, 4), (3, 3), 2, strides, [(1, 1), (1, 1)], (1, 1))
    lhs, rhs = case.data(0)
    clean = case.compiled({"conv_taps"})(lhs, rhs)["conv_taps"]
    dirty = case.compiled({"conv_taps"})(lhs, rhs.at[..., 0, 0, 0, 0].set(bad))["conv_taps"]
    reads = np.zeros(clean.shape, bool)
    reads[..., 1:, 1:, 0] = True  # the first tap of the first channel: no result at the upper or the left border
    assert not np.isfinite(dirty[reads]).any()
    assert np.array_equal(dirty[~reads], clean[~reads])


def test_what_it_leaves_to_others() -> None:
    plain = depthwise((6, 6), (3, 3), 4, (1, 1), "SAME", (1, 1))
    assert conv_taps.supports(plain.op) and choose(plain.op, 8, "gpu") == "conv_taps"
    one = depthwise((6, 6), (3, 3), 1, (1, 1), "SAME", (1, 1))
    large = depthwise((12, 12), (9, 9), 4, (1, 1), "SAME", (1, 1))
    assert not conv_taps.supports(one.op) and conv_taps.supports(large.op)
    call: Any = plain.call
    few = Case(partial(call, feature_group_count=2), plain.lhs, Aval((3, 3, 2, 4), jnp.float32), 2, 2)
    assert not conv_taps.supports(few.op)
    assert choose(large.op, 8, "gpu") == choose(few.op, 8, "gpu") == "conv_grouped"
