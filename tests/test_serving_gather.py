"""Rows are copied by one call where that can be, and by NumPy where not: what lies there is the same."""

from __future__ import annotations

import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from coalesce.serving import gather as module
from coalesce.serving.gather import gather, is_worth_it, join, LARGE, reader, SEVERAL, SMALL

pytestmark = pytest.mark.once
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a call of Linux")


def rows_of(count: int, nbytes: int, offset: int = 0) -> list[np.ndarray]:
    whole = [np.random.default_rng(i).integers(0, 256, nbytes + offset, np.uint8) for i in range(count)]
    return [row[offset:] for row in whole]


@LINUX
@given(st.integers(2, 9), st.integers(LARGE, LARGE + 9000), st.integers(0, 70), st.sampled_from([0, 3]))
def test_rows_lie_one_after_another(count, nbytes, offset, around):
    rows, place = rows_of(count, nbytes, offset), np.full((count + around, nbytes), 7, np.uint8)
    assert gather(rows, place[:count])
    np.testing.assert_array_equal(place[:count], np.stack(rows))
    assert (place[count:] == 7).all(), "nothing else is written"


def test_what_numpy_copies_as_well_is_left_to_it():
    place = np.zeros((2, LARGE), np.uint8)
    assert not gather(rows_of(1, LARGE), place[:1])
    assert not gather(rows_of(2, LARGE - 1), place[:, 1:])
    assert not gather([np.ones((LARGE, 2), np.uint8)[:, 0]] * 2, place), "in no one piece"
    assert not place.any()


@given(
    st.integers(SEVERAL, 9),
    st.sampled_from([(), (1,), (3, 5), (1, 501), (32, 40)]),
    st.sampled_from([np.float32, np.int8, np.bool_, np.complex64, jnp.bfloat16]),
    st.sampled_from([0, 3]),
)
def test_small_rows_are_joined(count, shape, dtype, around):
    drawn = np.random.default_rng(count).integers(0, 2, (count, *shape))
    rows, place = [np.array(row, dtype) for row in drawn], np.full((count + around, *shape), 1, dtype)
    assert join(rows, place)
    np.testing.assert_array_equal(place[:count], np.stack(rows), strict=True)
    assert (place[count:] == 1).all(), "nothing else is written"


def test_few_or_large_rows_and_those_in_several_pieces_are_not_joined():
    some, large = np.zeros((SEVERAL, 8), np.uint8), np.zeros((SEVERAL, SMALL // SEVERAL + 1), np.uint8)
    assert not join(rows_of(SEVERAL - 1, 8), some)
    assert not join(rows_of(SEVERAL, large.shape[1]), large)
    assert not join([np.ones((8, 2), np.uint8)[:, 0]] * SEVERAL, some)
    assert not join([np.ones((0, 8), np.uint8)] * SEVERAL, np.zeros((SEVERAL, 0, 8), np.uint8)), "of no bytes"
    assert not some.any() and not large.any()


@pytest.mark.parametrize("read", [None, lambda *_: -1, lambda *_: LARGE])
def test_where_it_is_forbidden_or_ends_early_nothing_is_promised(read, monkeypatch):
    monkeypatch.setattr(module, "reader", lambda: read)
    assert not gather(rows_of(2, LARGE), np.zeros((2, LARGE), np.uint8))
    assert not is_worth_it.__wrapped__()


@LINUX
@pytest.mark.parametrize(("by_one_call", "worth"), [(1.0, True), (5.0, False)])
def test_it_is_worth_it_unless_it_is_much_slower(by_one_call, worth, monkeypatch):
    times = iter([by_one_call, 1.0])
    monkeypatch.setattr(module, "least_s", lambda _: next(times))
    assert is_worth_it.__wrapped__() is worth


def test_a_system_without_the_call_has_none(monkeypatch):
    def library(_: Any) -> Any:
        raise OSError

    monkeypatch.setattr(module.ctypes, "CDLL", library)
    assert reader.__wrapped__() is None
