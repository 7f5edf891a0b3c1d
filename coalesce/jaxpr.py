"""Everything that takes a jaxpr apart or puts one together, and every difference between JAX versions.

The rest of the library sees these names. A *closed* jaxpr here has no constants: `trace` turns them into weights.
Equations are rebuilt in two ways only: `respell` replaces operands and same-signature regions of an equation, and
`stage` traces ordinary `lax` code, whose equations `Splicer` inlines. Control flow is never edited by hand: its
parameters differ between versions, the signature of `lax.scan` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.extend.core as jec
import jax.extend.source_info_util as siu
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn as Eqn, Literal, Var
from jax.interpreters import partial_eval as pe

Atom = Var | Literal

# Call-like primitives, and the parameter that holds what they call.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "call": "call_jaxpr",
    "eval_jaxpr": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "call_jaxpr",
}


# ---- reading -------------------------------------------------------------------------------------------------------


def is_jaxpr(value: object) -> bool:
    return isinstance(value, ClosedJaxpr | jec.Jaxpr)


def closed(value: Any) -> ClosedJaxpr:
    """A ClosedJaxpr, from one or from a bare Jaxpr (`remat2` on JAX 0.10 holds one)."""
    return value if isinstance(value, ClosedJaxpr) else ClosedJaxpr(value, ())


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


def is_key(aval: Any) -> bool:
    return jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)


def nbytes(aval: Any) -> int:
    return 0 if is_key(aval) else int(np.prod(aval.shape, dtype=np.int64)) * np.dtype(aval.dtype).itemsize


def literal_value(literal: Literal) -> Any:
    return literal.val


def short(aval: Any) -> str:
    """`f32[4,3]`, the form used in all texts."""
    return aval.str_short(short_dtypes=True) if hasattr(aval, "str_short") else struct_short(aval)


def struct_short(struct: Any) -> str:
    return jax.core.ShapedArray(struct.shape, struct.dtype).str_short(short_dtypes=True)


def source(eqn: Eqn) -> str:
    """`file:line` of the user's call that made the equation, or an empty string."""
    text = siu.summarize(eqn.source_info)
    return "" if text.startswith("<unknown") else text


def subjaxprs(eqn: Eqn) -> Iterator[ClosedJaxpr]:
    """The jaxprs that an equation holds, whatever the primitive."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if is_jaxpr(item):
                yield closed(item)


def walk(jaxpr: ClosedJaxpr) -> Iterator[Eqn]:
    """Every equation, also those inside other equations, outer before inner."""
    for eqn in jaxpr.jaxpr.eqns:
        yield eqn
        for sub in subjaxprs(eqn):
            yield from walk(sub)


# ---- control flow --------------------------------------------------------------------------------------------------


class Scan(NamedTuple):
    consts: list[Atom]
    init: list[Atom]
    xs: list[Atom]
    body: ClosedJaxpr  # (consts, carry, x) -> (carry, y)
    length: int
    reverse: bool
    unroll: Any


class While(NamedTuple):
    cond_consts: list[Atom]
    body_consts: list[Atom]
    init: list[Atom]
    cond: ClosedJaxpr  # (cond_consts, carry) -> bool
    body: ClosedJaxpr  # (body_consts, carry) -> carry


class Cond(NamedTuple):
    index: Atom
    operands: list[Atom]
    branches: tuple[ClosedJaxpr, ...]


def as_scan(eqn: Eqn) -> Scan:
    params = eqn.params
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
    else:  # JAX 0.11 and later
        consts, carry = (len(part) for part in params["ft_in"].unpack()[:2])
    ins = list(eqn.invars)
    body = closed(params["jaxpr"])
    split = ins[:consts], ins[consts : consts + carry], ins[consts + carry :]
    return Scan(*split, body, params["length"], params["reverse"], params["unroll"])


def as_while(eqn: Eqn) -> While:
    params, ins = eqn.params, list(eqn.invars)
    c, b = params["cond_nconsts"], params["body_nconsts"]
    return While(ins[:c], ins[c : c + b], ins[c + b :], closed(params["cond_jaxpr"]), closed(params["body_jaxpr"]))


def as_cond(eqn: Eqn) -> Cond:
    return Cond(eqn.invars[0], list(eqn.invars[1:]), tuple(map(closed, eqn.params["branches"])))


REGIONS = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}


def regions(eqn: Eqn) -> tuple[ClosedJaxpr, ...]:
    """The jaxprs of a scan, while or cond, in the order of `respell`; empty for every other equation."""
    found: list[ClosedJaxpr] = []
    for param in REGIONS.get(eqn.primitive.name, ()):
        value = eqn.params[param]
        found.extend(map(closed, value if isinstance(value, tuple | list) else (value,)))
    return tuple(found)


def region_operands(eqn: Eqn) -> list[tuple[list[Atom], int]]:
    """For each region: the operands that its arguments get, and how many of them, leading, are loop-invariant."""
    match eqn.primitive.name:
        case "scan":
            return [(list(eqn.invars), len(as_scan(eqn).consts))]
        case "while":
            loop = as_while(eqn)
            c, b = loop.cond_consts, loop.body_consts
            return [([*c, *loop.init], len(c)), ([*b, *loop.init], len(b))]
        case "cond":
            return [(list(eqn.invars[1:]), len(eqn.invars) - 1)] * len(eqn.params["branches"])
    return []


def region_args(eqn: Eqn, var: Var) -> Iterator[tuple[Var, ClosedJaxpr]]:
    """Where a control-flow equation hands an operand to its regions: (the region's argument, the region)."""
    for region, (atoms, _) in zip(regions(eqn), region_operands(eqn), strict=True):
        yield from ((arg, region) for arg, atom in zip(invars(region), atoms, strict=True) if atom is var)


# ---- building ------------------------------------------------------------------------------------------------------


def respell(
    eqn: Eqn, invars: Sequence[Atom], outvars: Sequence[Var], inner: Sequence[ClosedJaxpr] | None = None
) -> Eqn:
    """The equation with other operands and results, and with other regions of the same signatures."""
    if inner is None:
        return eqn.replace(invars=list(invars), outvars=list(outvars))
    params, rest = dict(eqn.params), iter(inner)
    for param in REGIONS[eqn.primitive.name]:
        old = params[param]
        params[param] = tuple(next(rest) for _ in old) if isinstance(old, tuple | list) else next(rest)
    return eqn.replace(invars=list(invars), outvars=list(outvars), params=params)


def close(invars: Sequence[Var], eqns: Sequence[Eqn], outvars: Sequence[Atom], name: str = "program") -> ClosedJaxpr:
    """A closed jaxpr without constants."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns)) if eqns else frozenset()
    args = tuple(f"a{i}" for i in range(len(invars)))
    debug = jec.DebugInfo("jit", name, args, tuple(f"r{i}" for i in range(len(outvars))))
    return ClosedJaxpr(jec.Jaxpr((), list(invars), list(outvars), list(eqns), effects, debug), ())


def stage(fn: Callable[..., Any], *args: Any) -> tuple[ClosedJaxpr, Any]:
    """Trace `fn`; returns its jaxpr and its output structure. Tracing the same `fn` twice is free: JAX caches it."""
    return jax.make_jaxpr(fn, return_shape=True)(*args)


def separate_consts(jaxpr: ClosedJaxpr) -> tuple[ClosedJaxpr, list[Any]]:
    """(jaxpr with its constants as leading arguments, the constants); the same object if it has none."""
    if not jaxpr.consts:
        return jaxpr, []
    inner = jaxpr.jaxpr
    return close([*inner.constvars, *inner.invars], inner.eqns, inner.outvars), list(jaxpr.consts)


def fresh(var: Any) -> Var:
    return Var(var.aval if hasattr(var, "aval") else var)


def fresh_out(var: Var) -> Var:
    return var if is_drop(var) else Var(var.aval)


def constant(value: Any, aval: Any) -> Literal:
    return Literal(value, aval)


class Splicer:
    """Collects equations; inlines whole jaxprs among them under fresh names.

    `memo` keeps traced fragments by (key, operand avals), so that the rewriting of fifty equal layers traces one.
    """

    def __init__(self) -> None:
        self.eqns: list[Eqn] = []

    def inline(self, jaxpr: ClosedJaxpr, args: Sequence[Atom], like: Eqn | None = None) -> list[Atom]:
        """Append the equations of `jaxpr` applied to `args`; returns its results. `like` lends source, name stack."""
        env: dict[Any, Atom] = dict(zip(jaxpr.jaxpr.invars, args, strict=True))
        for var, value in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
            env[var] = constant(value, var.aval)
        for eqn in jaxpr.jaxpr.eqns:
            outs = [fresh_out(v) for v in eqn.outvars]
            new = respell(eqn, [read(env, a) for a in eqn.invars], outs)
            if like is not None:
                new = new.replace(source_info=like.source_info, ctx=like.ctx)
            self.eqns.append(new)
            env.update((v, o) for v, o in zip(eqn.outvars, outs, strict=True) if not is_drop(v))
        return [read(env, a) for a in jaxpr.jaxpr.outvars]


def read(env: dict[Any, Any], atom: Atom) -> Any:
    return atom if isinstance(atom, Literal) else env.get(atom, atom)


def under(stack: Any, eqn: Eqn) -> Eqn:
    """The equation with a caller's name stack put before its own."""
    info = eqn.source_info
    return eqn.replace(source_info=info.replace(name_stack=stack + info.name_stack))


def drop_dead(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """JAX's own dead-code elimination, arguments kept."""
    inner, _ = pe.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
    return close(inner.invars, inner.eqns, inner.outvars)


# ---- running -------------------------------------------------------------------------------------------------------


@contextmanager
def context_of(eqn: Eqn) -> Iterator[None]:
    """The context an equation was traced in, and its place in the user's source."""
    with eqn.ctx.manager, siu.user_context(eqn.source_info.traceback, name_stack=siu.current_name_stack()):
        yield


def bind(eqn: Eqn, args: Sequence[Any]) -> list[Any]:
    """Apply an equation to values; always a list."""
    with context_of(eqn):
        outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


def evaluate(jaxpr: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Interpret a closed jaxpr on values or tracers."""
    return jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *args)


def set_weak_type(x: Any, weak: bool) -> Any:
    """`x` with the given weak type; results keep the weak type that the tenant's own run has."""
    from jax.extend.core.primitives import convert_element_type_p

    if bool(getattr(jax.typeof(x), "weak_type", False)) == weak:
        return x
    return convert_element_type_p.bind(x, new_dtype=x.dtype, weak_type=weak, sharding=None)


def verify(jaxpr: ClosedJaxpr) -> None:
    """JAX's own type check of a jaxpr (28 us an equation); raises what JAX raises."""
    jec.check_jaxpr(jaxpr.jaxpr)


# ---- PRNG keys -----------------------------------------------------------------------------------------------------


def key_struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def key_layout(aval: Any) -> tuple[Any, jax.ShapeDtypeStruct]:
    """(the key implementation, the struct of the key data) of a typed key array."""
    impl: list[Any] = []

    def data(key: jax.Array) -> jax.Array:
        impl.append(jax.random.key_impl(key))
        return jax.random.key_data(key)

    struct = jax.eval_shape(data, key_struct(aval))
    return impl[0], jax.ShapeDtypeStruct(struct.shape, struct.dtype)


def context_key(eqn: Eqn) -> Any:
    """What of an equation's context changes what it computes or where."""
    ctx = eqn.ctx
    return (ctx.compute_type, ctx.threefry_partitionable, repr(ctx.xla_metadata))
