"""What keeps tenants apart: anything that changes what is computed. explain() names a literal that alone does it."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import coalesce
from tests.alone import array, check_fused

X = array(2, 4)


def families(*tenants):
    return check_fused(tenants).report.families


def scan_of(length, reverse=False):
    def apply(w, x):
        return lax.scan(lambda c, _: (jnp.sin(c) @ w, c[0]), x, None, length, reverse)

    return apply


SPLITS = {
    "literals": (lambda w, x: (x @ w) * 2.0, lambda w, x: (x @ w) * 3.0),
    "literals' types": (lambda w, x: (x @ w).astype(int) * 2, lambda w, x: (x @ w) * 2.0),
    "primitives": (lambda w, x: jnp.sin(x @ w), lambda w, x: jnp.cos(x @ w)),
    "parameters": (lambda w, x: (x @ w).sum(0), lambda w, x: (x @ w).sum(1)),
    "precision": (lambda w, x: x @ w, lambda w, x: jnp.matmul(x, w, precision="highest")),
    "what does not commute": (lambda w, x: x - x @ w, lambda w, x: x @ w - x),
    "number of outputs": (lambda w, x: x @ w, lambda w, x: (x @ w, x)),
    "order of outputs": (lambda w, x: (x @ w, x), lambda w, x: (x, x @ w)),
    "weak types": (lambda w, x: ((x @ w).sum(), 2.0), lambda w, x: ((x @ w).sum(), np.float32(2))),
    "trip counts": (scan_of(3), scan_of(4)),
    "direction": (scan_of(3), scan_of(3, reverse=True)),
    "which value is read twice": (lambda w, x: (x @ w) * x * x, lambda w, x: (x @ w) * (x @ w) * x),
}


@pytest.mark.parametrize("name", SPLITS)
def test_kept_apart(name):
    one, other = SPLITS[name]
    assert families((one, array(4, 4), (X,)), (other, array(4, 4), (X,))) == 2


def test_what_is_no_number_keeps_nobody_apart():
    """Two NaNs are not equal, and neither are two tenants' objects of one."""

    def taking(nan):
        return lambda w, x: x + jnp.take(w, jnp.argmax(x, 1) * 3, axis=0, fill_value=nan)

    assert families(*((taking(float(nan)), array(4, 4), (X,)) for nan in ("nan", "-nan"))) == 1


@pytest.mark.parametrize(
    ("w", "x"), [((4, 5), (2, 4)), ((4, 4), (3, 4)), ((4, 4), (4,))], ids=["weights", "inputs", "ranks"]
)
def test_shapes_are_kept_apart(w, x):
    def apply(w, x):
        return x @ w

    assert families((apply, array(4, 4), (X,)), (apply, array(*w), (array(*x),))) == 2


def test_dtypes_are_kept_apart():
    def apply(w, x):
        return (x * 2).sum() + w

    assert families((apply, jnp.float32(1), (X,)), (apply, jnp.int32(1), (jnp.ones((2, 4), int),))) == 2


def test_explain_names_the_literal():
    def scaled(by):
        return lambda w, x: jnp.tanh(x @ w) * by

    scales = {"a": 0.5, "b": 0.25, "c": 0.5}
    fused = coalesce.fuse([coalesce.trace(scaled(by), array(4, 4), X, name=name) for name, by in scales.items()])
    assert fused.report.families == 2
    [line] = [line for line in fused.explain().splitlines() if "a literal alone" in line]
    assert line.startswith("families 0 and 1 differ in a literal alone: mul has 0.5 in 0 and 0.25 in 1 at ")
    assert f"{__file__}:{scaled.__code__.co_firstlineno + 1}" in line
    assert "make it an array in params" in line


def test_explain_names_the_literal_inside_a_loop():
    def decay(by):
        return lambda w, x: lax.fori_loop(0, 3, lambda _, c: jnp.sin(c @ w) * by, x)

    fused = coalesce.fuse([coalesce.trace(decay(b), array(4, 4), X, name=f"by{b}") for b in (0.5, 0.25)])
    assert "differ in a literal alone: mul has 0.5 in 0 and 0.25 in 1" in fused.explain()


def test_explain_is_silent_about_literals_where_more_differs():
    fused = coalesce.fuse(
        [
            coalesce.trace(lambda w, x: jnp.sin(x @ w) * 2.0, array(4, 4), X, name="a"),
            coalesce.trace(lambda w, x: jnp.cos(x @ w) * 3.0, array(4, 4), X, name="b"),
        ]
    )
    assert "literal alone" not in fused.explain()
