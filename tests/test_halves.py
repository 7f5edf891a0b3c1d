"""The quick functions of 16 bits, at every number that there is, against the float64 of NumPy and math."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from coalesce import jaxpr as J
from coalesce.kernels.epilogue import on_tile, WIDENED
from coalesce.kernels.halves import FUNCTIONS

EXACT = {
    "erf": np.vectorize(math.erf, [np.float64]),
    "erfc": np.vectorize(math.erfc, [np.float64]),
    "exp": np.exp,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}
ERROR = 1e-4  # of the result, before it is rounded


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", list(EXACT))
def test_every_number_of_16_bits(name, dtype):
    x = lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), jnp.dtype(dtype))
    (eqn,) = jax.make_jaxpr(getattr(lax, name))(x).jaxpr.eqns
    with np.errstate(all="ignore"):
        want = EXACT[name](np.asarray(x, np.float64))
        ends = [np.asarray((want * factor).astype(x.dtype), np.float64) for factor in (1 - ERROR, 1 + ERROR)]
        got = np.asarray(on_tile(eqn, [x]), np.float64)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    least = 2 * float(jnp.finfo(dtype).tiny)  # what is smaller may become zero, as operands without a normal form do
    number = ~np.isnan(want)
    assert np.all((np.minimum(*ends) - least <= got)[number] & (got <= np.maximum(*ends) + least)[number])
    zero = np.asarray(x == 0)
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(want[zero]))


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_no_division_and_no_other_exponential(name):
    """A GPU's units are what makes them quick: of the slow ones there is none left."""
    assert name in WIDENED
    x = jax.ShapeDtypeStruct((4,), jnp.float32)
    found = {eqn.primitive.name for eqn in J.walk(jax.make_jaxpr(FUNCTIONS[name])(x))}
    assert not found & {"div", "exp", "tanh", "logistic", "erf", "erfc", "log"} and found & {"rsqrt", "exp2", "mul"}


def test_an_infinity_has_the_reciprocal_zero():
    ends: dict[str, list[Any]] = {"logistic": [0, 1], "tanh": [-1, 1], "erfc": [2, 0], "exp": [0, np.inf]}
    for name, want in ends.items():
        got = FUNCTIONS[name](jnp.asarray([-np.inf, np.inf], jnp.float32))
        np.testing.assert_allclose(got, want, atol=1e-4)
