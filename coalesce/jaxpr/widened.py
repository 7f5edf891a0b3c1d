"""A jaxpr in float32: what it computes in 16 bits is computed in 32, however deep inside it is cast to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn as Eqn, Literal

from coalesce.jaxpr.control import as_cond, as_scan, as_while
from coalesce.jaxpr.read import callee, dtype, outvars, shape, subjaxprs
from coalesce.jaxpr.rebuilt import while_any
from coalesce.jaxpr.run import bind

LOW = (jnp.dtype("bfloat16"), jnp.dtype("float16"))
BITS = frozenset({"bitcast_convert_type", "nextafter", "random_bits", "reduce_precision"})  # that depend on the width
PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
DTYPES = ("dtype", "new_dtype", "preferred_element_type")  # parameters that name one


def is_low(x: Any) -> bool:
    """Whether it is of 16 bits: a value, or a type."""
    return getattr(x, "dtype", None) in LOW


def widened(x: Any) -> Any:
    """A value of 16 bits in 32, any other as it is."""
    return jnp.asarray(x, jnp.float32) if is_low(x) else x


def evaluate_widened(jaxpr: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Its results on arguments of its types, with floats of 16 bits in 32 and products at precision "highest".

    Raises:
      TypeError: an equation depends on how wide its floats are, or holds a jaxpr that is no control flow.
    """
    env: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return widened(atom.val if isinstance(atom, Literal) else env[atom])

    env.update(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.jaxpr.invars, args, strict=True))
    for eqn in jaxpr.jaxpr.eqns:
        env.update(zip(eqn.outvars, in_float32(eqn, read), strict=True))
    return [read(atom) for atom in jaxpr.jaxpr.outvars]


def in_float32(eqn: Eqn, read: Callable[[Any], Any]) -> Sequence[Any]:
    name, called = eqn.primitive.name, callee(eqn)
    if called is not None:
        return evaluate_widened(called, list(map(read, eqn.invars)))
    if name in CONTROL:
        return CONTROL[name](eqn, read)
    low = any(is_low(atom.aval) for atom in [*eqn.invars, *eqn.outvars])
    if low and (name in BITS or any(subjaxprs(eqn))):
        raise TypeError(f"{name} of 16 bits is something else in 32")
    params = dict(eqn.params)
    if low:
        params |= {own: jnp.dtype(jnp.float32) for own in DTYPES if params.get(own) in LOW}
    if name in PRODUCTS and all(jnp.issubdtype(dtype(atom), jnp.inexact) for atom in eqn.invars):
        params["precision"] = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    return bind(eqn, list(map(read, eqn.invars)), params)


def scan(eqn: Eqn, read: Callable[[Any], Any]) -> Sequence[Any]:
    own = as_scan(eqn)
    consts, init, xs = (list(map(read, part)) for part in (own.consts, own.init, own.xs))

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = evaluate_widened(own.body, [*consts, *carry, *x])
        return outs[: len(carry)], outs[len(carry) :]

    carry, ys = lax.scan(step, init, xs, own.length, own.reverse, own.unroll)
    return [*carry, *ys]


def while_loop(eqn: Eqn, read: Callable[[Any], Any]) -> Sequence[Any]:
    own = as_while(eqn)
    asked, done = (list(map(read, part)) for part in (own.cond_consts, own.body_consts))
    return while_any(
        lambda carry: evaluate_widened(own.cond, [*asked, *carry])[0],
        lambda carry: evaluate_widened(own.body, [*done, *carry]),
        list(map(read, own.init)),
        len(shape(outvars(own.cond)[0])),
    )


def cond(eqn: Eqn, read: Callable[[Any], Any]) -> Sequence[Any]:
    own = as_cond(eqn)
    branches = [lambda *given, own=branch: evaluate_widened(own, given) for branch in own.branches]
    return lax.switch(jnp.asarray(read(own.index), jnp.int32), branches, *map(read, own.operands))


CONTROL: dict[str, Callable[[Eqn, Callable[[Any], Any]], Sequence[Any]]] = {
    "scan": scan,
    "while": while_loop,
    "cond": cond,
}
