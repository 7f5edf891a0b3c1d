"""Running jaxprs and equations on values or tracers, with the context and source they were traced with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.extend.core as jec
import jax.extend.source_info_util as siu
from jax.core import eval_jaxpr
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import ClosedJaxpr, JaxprEqn as Eqn
from jax.extend.core.primitives import convert_element_type_p


@contextmanager
def context_of(eqn: Eqn) -> Iterator[None]:
    """The context an equation was traced in, and its place in the user's source."""
    info = eqn.source_info
    with eqn.ctx.manager, siu.user_context(info.traceback, name_stack=siu.current_name_stack() + info.name_stack):
        yield


def bind(eqn: Eqn, args: Sequence[Any], params: dict[str, Any] | None = None) -> list[Any]:
    """Apply an equation, with its own parameters unless others are given, to values; always a list."""
    with context_of(eqn):
        outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(params or eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


def evaluate(jaxpr: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Interpret a closed jaxpr on values or tracers."""
    return eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *args)


def precision_as_traced() -> Any:
    """A context in which equations that were traced without a precision keep none, whatever the caller's default."""
    return jax.default_matmul_precision(None)  # pyright: ignore[reportArgumentType]


def is_jit_disabled() -> bool:
    """Whether `jax.disable_jit` is set: then JAX runs what it is given step by step, and refuses what is compiled."""
    return bool(getattr(jax.config, "jax_disable_jit"))  # noqa: B009, whose attributes type checkers do not see


@contextmanager
def cpu_small_call() -> Iterator[None]:
    """Calls staged here stay calls and run as one kernel on XLA's CPU backend.

    A program is a chain of kernels there until many small results hang off one value; then XLA hands all of its kernels
    to a thread pool, which costs a program of small kernels a third of its time.
    """
    with set_xla_metadata(inlineable="false", xla_cpu_small_call="true"):
        yield


def set_weak_type(x: Any, weak: bool) -> Any:
    """`x` with the given weak type; results keep the weak type that the tenant's own run has."""
    if bool(getattr(jax.typeof(x), "weak_type", False)) == weak:
        return x
    return convert_element_type_p.bind(x, new_dtype=x.dtype, weak_type=weak, sharding=None)


def verify(jaxpr: ClosedJaxpr) -> None:
    """JAX's own type check of a jaxpr (28 us an equation); raises what JAX raises."""
    jec.check_jaxpr(jaxpr.jaxpr)
