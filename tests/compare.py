"""When two results are the same: the tests' one tolerance policy, by norm and not by element.

    assert_same(got, want)              float32 at precision "highest": 1e-5 of the norm; integers and bools exact
    assert_as_good(got, own, truth)     low precision: at most 1.5 times the tenant's own error, plus a floor
    assert_bitwise(got, want)           the same bits, NaN payloads included

A norm of almost nothing (what a cancellation leaves) has no relative precision left, so it counts as FLOOR an element;
all values of the tests are of order one, and a wrong lane is off by as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RELATIVE = 1e-5
FLOOR = 0.01
TIMES = 1.5
ROUNDINGS = 1.0


def assert_same(got: Any, want: Any, exact: Sequence[bool] | None = None) -> None:
    """Equal pytrees, shapes, dtypes, weak types and values; `exact` marks leaves that must agree bit by bit."""
    pairs = matched(got, want)
    for i, (path, a, b) in enumerate(pairs):
        if not jnp.issubdtype(b.dtype, jnp.inexact) or (exact is not None and exact[i]):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)
            continue
        error, scale = distance(a, b), norm(b)
        assert error <= RELATIVE * scale, f"{path}: error {error:.3g}, norm {scale:.3g}: {error / scale:.3g} relative"


def assert_as_good(got: Any, own: Any, truth: Any, exact: Sequence[bool]) -> None:
    for i, (path, a, b) in enumerate(matched(got, own)):
        if exact[i] or not jnp.issubdtype(b.dtype, jnp.inexact):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)
            continue
        t = jax.tree.leaves(truth)[i]
        fused, alone = distance(a, t), distance(b, t)
        limit = TIMES * alone + ROUNDINGS * float(jnp.finfo(b.dtype).eps) * norm(t)
        assert fused <= limit, (
            f"{path}: error {fused:.3g} fused, {alone:.3g} alone, limit {limit:.3g}, norm {norm(t):.3g}"
        )


def assert_bitwise(got: Any, want: Any) -> None:
    for path, a, b in matched(got, want):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), f"{path}: {a} is not {b}"


def matched(got: Any, want: Any) -> list[tuple[str, Any, Any]]:
    """(path, leaf, leaf) of two pytrees that must be alike in everything but values."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    pairs = [
        (jax.tree_util.keystr(path), a, b)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
    ]
    for path, a, b in pairs:
        assert jax.typeof(a) == jax.typeof(b), f"{path}: {jax.typeof(a)}, expected {jax.typeof(b)}"
        assert jax.typeof(a).weak_type == jax.typeof(b).weak_type, f"{path}: weak type is not {jax.typeof(b).weak_type}"
    return pairs


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.complex128 if jnp.iscomplexobj(x) else np.float64)


def distance(a: Any, b: Any) -> float:
    """The norm of the difference; infinite unless NaNs and infinities stand at the same places."""
    a, b = wide(a), wide(b)
    odd = ~np.isfinite(a) | ~np.isfinite(b)
    if not np.array_equal(a[odd], b[odd], equal_nan=True):
        return float("inf")
    return float(np.linalg.norm(a[~odd] - b[~odd]))


def norm(x: Any) -> float:
    x = wide(x)
    return max(float(np.linalg.norm(x[np.isfinite(x)])), FLOOR * max(1, x.size) ** 0.5)
