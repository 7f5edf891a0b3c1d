"""Whether a tenant gets in company what it gets alone: its example through both, and the contract on numerics.

    a float      within RELATIVE of the tenant's own result, in norm; or no further from a reference in float32 at
                 "highest" than TIMES the tenant's own distance, plus a rounding
    the rest     equal, unless a float product, convolution or reduction feeds it: then a tie may fall either way

A result of less than SMALL an element may be what a cancellation leaves, which has no relative precision: it may be as
far off as SHAKEN times what the tenant's own result moves where each number that it is given moves by a rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coalesce import jaxpr as J
from coalesce.bank import on_device
from coalesce.errors import InvalidInput
from coalesce.program import Program
from coalesce.serving.making import Jitted, Make, make_here

RELATIVE = 1e-5
TIMES = 1.5
SMALL = 0.01
SHAKEN = 16
SUMMING = frozenset(
    """dot_general conv_general_dilated ragged_dot_general reduce reduce_sum reduce_prod reduce_window reduce_window_sum
    select_and_scatter_add cumsum cumprod cumlogsumexp scatter-add scatter_add scatter_mul fft""".split()
)


def check_examples(tenant: str, shapes: Iterable[Sequence[Any]], params: Any) -> None:
    """Raises InvalidInput: there must be something to compute with."""
    for leaf in jax.tree.leaves((list(shapes), params)):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise InvalidInput(
                f"tenant {tenant!r}: verify=True computes with the example, which holds a ShapeDtypeStruct; give arrays"
            )


class Unlike(Exception):
    """A tenant gets something else in company; says what."""


class Alone:
    """What a tenant computes by itself on an example, and what a better computer would; both compiled by `make`."""

    def __init__(
        self,
        program: Program,
        fn: Callable[..., Any],
        params: Any,
        inputs: Sequence[Any],
        make: Make = make_here,
    ) -> None:
        self._fn, self._given, self._make = fn, (params, *inputs), make
        self.own = self._run(self._given)
        self._floats = sums_floats(program)
        self._off: list[np.ndarray] | None = None

    def fault(self, got: Any) -> str:
        """What is wrong with a result; nothing if it is within tolerance."""
        found = flat(got)
        far = [
            i
            for i, (a, b) in enumerate(zip(found, self.own, strict=True))
            if not (equal(a, b) if not is_float(b) else near(a, b)) and (is_float(b) or not self._floats[i])
        ]
        if not far:
            return ""
        truth = self._truth()
        for i in far:
            a, b = found[i], self.own[i]
            if not is_float(b):
                return f"output {i}, {b.dtype}{list(b.shape)}, differs, and no float operation feeds it"
            error, own = distance(a, truth[i]), distance(b, truth[i])
            scale = norm(truth[i])
            limit = TIMES * own + float(jnp.finfo(b.dtype).eps) * scale
            if scale < SMALL * b.size**0.5:
                limit += SHAKEN * distance(self._shaken()[i], b)
            if not error <= limit:
                scale = scale or 1.0
                return (
                    f"output {i}, {b.dtype}{list(b.shape)}, is off by {error / scale:.3g} of its norm, alone by "
                    f"{own / scale:.3g}; at most {limit / scale:.3g} is within tolerance"
                )
        return ""

    def _truth(self) -> list[np.ndarray]:
        """In float32 at "highest", also what it casts to 16 bits by itself; where that cannot be, as it is."""
        alone, leaves = self._flattened(self._given)
        with jax.default_matmul_precision("highest"):
            try:
                jaxpr, _ = J.stage(alone, leaves)
                wide, _ = J.stage(lambda given: J.evaluate_widened(jaxpr, given), leaves)
            except (TypeError, ValueError):
                return self._run(self._given)
            return self._made(lambda given: J.evaluate(wide, given), leaves)

    def _shaken(self) -> list[np.ndarray]:
        """Its own on an example and weights of which each number is off by a rounding."""
        if self._off is None:
            rng = np.random.default_rng(0)
            self._off = self._run(jax.tree.map(lambda x: rounded_elsewhere(x, rng), self._given))
        return self._off

    def _run(self, given: tuple[Any, ...]) -> list[np.ndarray]:
        return self._made(*self._flattened(given))

    def _flattened(self, given: tuple[Any, ...]) -> tuple[Callable[[list[Any]], list[Any]], list[Any]]:
        """The function by leaves, and these: what the tenant's own containers are is nobody else's business."""
        leaves, tree = jax.tree.flatten(given)

        def alone(own: list[Any]) -> list[Any]:
            return jax.tree.leaves(self._fn(*jax.tree.unflatten(tree, own)))

        return alone, on_device(leaves)

    def _made(self, function: Callable[[list[Any]], list[Any]], leaves: list[Any]) -> list[np.ndarray]:
        return flat(self._make(lambda: Jitted(jax.jit(function), (leaves,)))(leaves))


def sums_floats(program: Program) -> list[bool]:
    """Of each output, whether something feeds it that sums floats, in an order that depends on how it is run."""
    fed: set[Any] = set()
    for eqn in program.jaxpr.jaxpr.eqns:
        if any(not isinstance(a, J.Literal) and a in fed for a in eqn.invars) or holds_sum(eqn):
            fed.update(eqn.outvars)
    return [not isinstance(a, J.Literal) and a in fed for a in J.outvars(program.jaxpr)]


def holds_sum(eqn: J.Eqn) -> bool:
    """Whether it is a sum of floats, or has one in a loop, a branch or a call."""
    if eqn.primitive.name in SUMMING:
        return any(jnp.issubdtype(J.dtype(v), jnp.inexact) for v in eqn.outvars)
    return any(holds_sum(inner) for own in J.subjaxprs(eqn) for inner in own.jaxpr.eqns)


def flat(result: Any) -> list[np.ndarray]:
    def one(x: Any) -> np.ndarray:
        return np.asarray(jax.random.key_data(x) if J.is_key(jax.typeof(x)) else x)

    return [one(x) for x in jax.tree.leaves(result)]


def rounded_elsewhere(x: Any, rng: np.random.Generator) -> Any:
    """An array of floats, each up to a rounding larger or smaller."""
    if not hasattr(x, "dtype") or not is_float(x):
        return x
    off = 1 + rng.uniform(-1, 1, np.shape(x)) * float(jnp.finfo(x.dtype).eps)
    return jnp.asarray(np.asarray(x) * off, x.dtype)


def is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a, b)


def near(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and distance(a, b) <= RELATIVE * norm(b)


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The norm of the difference; infinite unless NaNs and infinities stand at the same places."""
    a, b = wide(a), wide(b)
    odd = ~np.isfinite(a) | ~np.isfinite(b)
    if not np.array_equal(a[odd], b[odd], equal_nan=True):
        return float("inf")
    return float(np.linalg.norm((a - b)[~odd]))


def norm(x: np.ndarray) -> float:
    x = wide(x)
    return float(np.linalg.norm(x[np.isfinite(x)]))
