"""Functions of numbers of 16 bits, computed in 32 by few instructions: a tile of a product has many elements and few
warps, so that an epilogue's instructions are time.

Right to 1e-4 of the result, where bfloat16 keeps 4e-3 and float16 5e-4. Of what a GPU has units for there are the
reciprocal square root and the power of two; divisions and other exponentials are some ten instructions each. A
reciprocal is the square of the former, which is zero of an infinity, as it has to be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log2
from typing import Any

import jax.numpy as jnp
from jax import lax

LOG2_E = log2(2.718281828459045)
# erfc(z) = t 2^(series of t - z^2 log2 e) with t = 1 / (1 + z/2), right to 8e-6 of itself for z >= 0; of powers of t,
# the highest first. Both series are minimax fits, by least squares with weights that follow the error (Lawson).
ERFC = (0.33006919, -1.0231305, 0.68453183, 0.36709274, 1.468681, -1.8272333)
# erf(x) = x series of x^2, right to 2.3e-5 of itself up to ERF_ENDS, where it is within as much of 1.
ERF = (
    4.5205158e-08, -2.1201368e-06, 4.3910124e-05, -5.3577229e-04, 4.3587736e-03, -2.5456013e-02, 0.11162506,
    -0.37570404, 1.1283533,
)  # fmt: skip
ERF_ENDS = 3.0
NEAR_ZERO = 2.0**-6  # tanh(x) is x below, but for a third of the square


def reciprocal(x: Any) -> Any:
    """Of a number that is not negative."""
    root = lax.rsqrt(x)
    return root * root


def exponential(x: Any) -> Any:
    return jnp.exp2(LOG2_E * x)


def logistic(x: Any) -> Any:
    return reciprocal(1.0 + jnp.exp2(-LOG2_E * x))


def hyperbolic_tangent(x: Any) -> Any:
    return jnp.where(jnp.abs(x) < NEAR_ZERO, x, 1.0 - 2.0 * reciprocal(1.0 + jnp.exp2(2.0 * LOG2_E * x)))


def error_function(x: Any) -> Any:
    inside = jnp.where(x > ERF_ENDS, ERF_ENDS, jnp.where(x < -ERF_ENDS, -ERF_ENDS, x))  # a NaN stays one
    return inside * polynomial(ERF, inside * inside)


def complementary_error(x: Any) -> Any:
    z = jnp.abs(x)
    t = reciprocal(1.0 + 0.5 * z)
    positive = t * jnp.exp2(polynomial(ERFC, t) - LOG2_E * (z * z))
    return jnp.where(x < 0, 2.0 - positive, positive)


def polynomial(factors: Sequence[float], x: Any) -> Any:
    """By Horner's rule, the highest power first."""
    first, *others = factors
    total = first * x + others[0]
    for factor in others[1:]:
        total = total * x + factor
    return total


FUNCTIONS: Mapping[str, Callable[[Any], Any]] = {
    "erf": error_function,
    "erfc": complementary_error,
    "exp": exponential,
    "logistic": logistic,
    "tanh": hyperbolic_tangent,
}
