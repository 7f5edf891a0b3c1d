"""Layouts of weights in their banks: padding, and one layout after another."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings, strategies as st

from coalesce.layout import AS_IS, pad_to
from tests.compare import assert_bitwise
from tests.programs import Draw


def test_padding_a_row():
    at = AS_IS.pad((3, 4))
    row = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    assert at.of((2, 3)) == (3, 4)
    np.testing.assert_array_equal(at(row), [[0, 1, 2, 0], [3, 4, 5, 0], [0, 0, 0, 0]])
    assert AS_IS.pad((2, 3))(row) is row
    assert pad_to(row, (2, 3)) is row
    assert str(at) == "padded to [3, 4]"
    assert (at(row > 0).dtype, at(row.astype(jnp.bfloat16)).dtype) == (jnp.bool_, jnp.bfloat16)


def test_zeros_before_a_row():
    at = AS_IS.lead((0, 1))
    row = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    assert at.of((2, 3)) == (2, 4)
    np.testing.assert_array_equal(at(row), [[0, 0, 1, 2], [0, 3, 4, 5]])
    assert str(at) == "behind zeros [0, 1]"


def test_one_layout_after_another():
    first, second = AS_IS.pad((3, 4)), AS_IS.transpose((1, 0)).reshape((2, 6))
    both = first.then(second)
    row = jnp.arange(6.0).reshape(2, 3)
    assert both.of((2, 3)) == second.of(first.of((2, 3))) == (2, 6)
    assert_bitwise(both(row), second(first(row)))
    assert str(both) == "padded to [3, 4], transposed by [1, 0], as [2, 6]"
    assert AS_IS.then(first) == first.then(AS_IS) == first
    assert hash(both) == hash(AS_IS.pad((3, 4)).transpose((1, 0)).reshape((2, 6)))


@settings(max_examples=max(5, settings().max_examples // 5))
@given(st.integers(0, 2**32 - 1))
def test_a_layout_keeps_every_element(seed: int) -> None:
    """Once each, and zeros besides; `of` says the shape."""
    pick = Draw(seed)
    shape = tuple(pick.integer(1, 4) for _ in range(pick.integer(1, 3)))
    row = np.arange(1, int(np.prod(shape)) + 1, dtype=np.int32).reshape(shape)
    layout = AS_IS
    for _ in range(pick.integer(1, 4)):
        now = layout.of(shape)
        match pick.integer(0, 3):
            case 0:
                layout = layout.then(AS_IS.pad(tuple(n + pick.integer(0, 2) for n in now)))
            case 3:
                layout = layout.lead(tuple(pick.integer(0, 2) for _ in now))
            case 1:
                layout = layout.transpose(tuple(pick.shuffled(range(len(now)))))
            case _:
                layout = layout.reshape((int(np.prod(now)),))
    moved = np.asarray(jax.jit(layout)(row))
    assert moved.shape == layout.of(shape)
    np.testing.assert_array_equal(np.sort(moved[moved > 0]), np.arange(1, row.size + 1))
    assert np.sum(moved == 0) == moved.size - row.size
