"""Reading a jaxpr: variables, types, sources, and what an equation holds."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core as jec
import jax.extend.source_info_util as siu
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, JaxprEqn as Eqn, Literal, Var

Atom = Var | Literal
WIDE = ("int64", "uint64", "float64", "complex128")

# Where packages are installed, and the standard library.
INSTALLED = tuple({sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib")})

# Call-like primitives, and the parameter that holds what they call.
CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "call": "call_jaxpr",
    "eval_jaxpr": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def is_jaxpr(value: object) -> bool:
    return isinstance(value, ClosedJaxpr | jec.Jaxpr)


def closed(value: Any) -> ClosedJaxpr:
    """A ClosedJaxpr, from one or from a bare Jaxpr (`remat2` on JAX 0.10 holds one). Constants of a bare one, as
    Pallas' kernels on JAX 0.10 have, are arguments of it."""
    if isinstance(value, ClosedJaxpr):
        return value
    if value.constvars:
        given = [*value.constvars, *value.invars]
        debug = jec.DebugInfo("jit", "region", ("",) * len(given), ("",) * len(value.outvars))
        value = jec.Jaxpr((), given, value.outvars, value.eqns, value.effects, debug)
    return ClosedJaxpr(value, ())


def invars(jaxpr: ClosedJaxpr) -> list[Var]:
    return list(jaxpr.jaxpr.invars)


def outvars(jaxpr: ClosedJaxpr) -> list[Atom]:
    return list(jaxpr.jaxpr.outvars)


def callee(eqn: Eqn) -> ClosedJaxpr | None:
    """What a call-like equation calls, else None."""
    param = CALLS.get(eqn.primitive.name)
    if param not in eqn.params or not is_jaxpr(eqn.params[param]):
        return None
    return closed(eqn.params[param])


def is_drop(var: object) -> bool:
    return isinstance(var, jec.DropVar)


def aval_struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def dtype(atom: Any) -> str:
    return str(atom.aval.dtype)


def is_key(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jax.dtypes.extended)


def is_wide(aval: Any) -> bool:
    """Whether it is of a type that is there under jax_enable_x64 alone."""
    return str(aval.dtype) in WIDE


def takes_wide() -> bool:
    """Whether jax_enable_x64 is set in this thread."""
    return bool(getattr(jax.config, "jax_enable_x64"))  # noqa: B009, whose attributes type checkers do not see


def nbytes(aval: Any) -> int:
    return 0 if is_key(aval) else int(np.prod(aval.shape, dtype=np.int64)) * np.dtype(aval.dtype).itemsize


def literal_value(literal: Literal) -> Any:
    return literal.val


def short(aval: Any) -> str:
    """`f32[4,3]`, the form used in all texts."""
    return aval.str_short(short_dtypes=True) if hasattr(aval, "str_short") else struct_short(aval)


def struct_short(struct: Any) -> str:
    return ShapedArray(struct.shape, struct.dtype).str_short(short_dtypes=True)


def source(eqn: Eqn) -> str:
    """`file:line (function)` of the user's call that made the equation, or an empty string.

    The innermost line outside of installed packages: a model's own line rather than flax's. If there is none, the
    innermost line outside of JAX.
    """
    trace = eqn.source_info.traceback
    for frame in trace.frames if trace is not None else ():
        if not frame.file_name.startswith(INSTALLED) and not frame.file_name.startswith("<"):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    text = siu.summarize(eqn.source_info)
    return "" if text.startswith("<unknown") else text


def scopes(eqn: Eqn) -> list[str]:
    """The names of the scopes and transformations that an equation was traced under, the outermost first."""
    return [item.name for item in eqn.source_info.name_stack.stack]


def subjaxprs(eqn: Eqn) -> Iterator[ClosedJaxpr]:
    """The jaxprs that an equation holds, whatever the primitive."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if is_jaxpr(item):
                yield closed(item)


def primitives(eqn: Eqn) -> frozenset[str]:
    """The names of the equation's primitive and of all those inside it."""
    return frozenset({eqn.primitive.name}.union(e.primitive.name for sub in subjaxprs(eqn) for e in walk(sub)))


def walk(jaxpr: ClosedJaxpr) -> Iterator[Eqn]:
    """Every equation, also those inside other equations, outer before inner."""
    for eqn in jaxpr.jaxpr.eqns:
        yield eqn
        for sub in subjaxprs(eqn):
            yield from walk(sub)


def context_key(eqn: Eqn) -> Any:
    """What of an equation's context changes what it computes or where."""
    ctx = eqn.ctx
    return (ctx.compute_type, ctx.threefry_partitionable, repr(ctx.xla_metadata))
