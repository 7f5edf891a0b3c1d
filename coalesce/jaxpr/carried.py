"""Jaxprs, and whatever holds some, as bytes for another process that has the same JAX.

    carried = dumps(value, known)       raises Uncarried
    value   = loads(carried, known)

A variable that stands at several places is one variable there too, and an object of `known` is the one that stands
there in the other's `known`. What would be something else in the other process is refused: arrays on a device, calls
back into Python, meshes of devices, and what is defined outside of the packages that both have imported anyway. To
import a user's module may do anything, and what its globals are there may differ. Lines of source stay behind.
"""

from __future__ import annotations

import importlib
import io
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import jax
import jax.extend.core as jec
import jax.extend.source_info_util as siu
import numpy as np
from jax.core import ShapedArray
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import ClosedJaxpr, JaxprEqn as Eqn, Primitive

from coalesce.jaxpr.read import is_jaxpr

DERIVED = ("custom_jvp_call", "custom_vjp_call")
NAMED = type, FunctionType, BuiltinFunctionType, MethodType  # what pickle finds by its name
ROOTS = frozenset("builtins coalesce collections copyreg functools jax jaxlib ml_dtypes numpy operator".split())


class Uncarried(Exception):
    """Says what cannot be brought to another process."""


def dumps(value: Any, known: Sequence[object] = (), inlined: bool = False) -> bytes:
    """`inlined`: calls with derivatives of their own, which are closures, are carried without these, for who puts what
    they call in their place."""
    stream = io.BytesIO()
    try:
        Packer(stream, known, inlined).dump(value)
    except Exception as e:  # whoever made an object may raise anything when it is asked what it is made of
        raise Uncarried(f"{type(e).__name__}: {str(e)[:200]}") from e
    return stream.getvalue()


def loads(carried: bytes, known: Sequence[object] = ()) -> Any:
    return Unpacker(io.BytesIO(carried), known).load()


class Packer(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, known: Sequence[object], inlined: bool) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._known, self._inlined = {id(x): i for i, x in enumerate(known)}, inlined
        self._names: Mapping[int, tuple[str, str]] = {}

    def persistent_id(self, obj: object) -> int | None:
        return self._known.get(id(obj)) if self._known else None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Eqn) and obj.primitive.name in DERIVED and not self._inlined:
            raise pickle.PicklingError(f"{obj.primitive.name} has derivatives of its own")
        rule = carried_rules.get(type(obj))
        if rule is not None:
            return rule(obj)
        place = self._place(obj)
        if place is not None:
            return find, place
        if isinstance(obj, Primitive):
            raise pickle.PicklingError(f"the primitive {obj.name} is of no module that both processes have")
        if isinstance(obj, np.ndarray) and type(obj) is not np.ndarray:  # JAX's own literals
            return type(obj), (np.asarray(obj), jax.typeof(obj))
        if isinstance(obj, jax.Array):
            raise pickle.PicklingError(f"an array of {obj.dtype}{list(obj.shape)} on a device")
        if isinstance(obj, NAMED):
            module = getattr(obj, "__module__", None) or "builtins"
            if module.partition(".")[0].lstrip("_") not in ROOTS:
                raise pickle.PicklingError(f"{obj!r} is of a module that the other process does not have")
        return NotImplemented

    def _place(self, obj: Any) -> tuple[str, str] | None:
        """Where it is found there too, if it is like nothing but itself; of primitives no two share a place."""
        if isinstance(obj, Primitive) and "callback" in obj.name:
            raise pickle.PicklingError(f"{obj.name} calls back into this process")
        if not is_one_of_a_kind(obj):
            return None
        if not self._names:
            self._names = places(len(sys.modules))
        place = self._names.get(id(obj))
        return place if place is not None and find(*place) is obj else None


class Unpacker(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, known: Sequence[object]) -> None:
        super().__init__(stream)
        self._known = known

    def persistent_load(self, pid: int) -> object:
        return self._known[pid]


def is_one_of_a_kind(x: object) -> bool:
    """Whether a copy would be another: primitives, and JAX's words for what nobody has said, say."""
    return type(x).__eq__ is object.__eq__ and not isinstance(x, NAMED)


@lru_cache(maxsize=1)
def places(modules: int) -> Mapping[int, tuple[str, str]]:
    """Of each such object, by its id, the module and the name; looked for again when there are more modules."""
    return {
        id(value): (name, attribute)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in ROOTS
        for attribute, value in list(vars(module).items())
        if is_one_of_a_kind(value)
    }


def find(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def carried_eqn(eqn: Eqn) -> Any:
    if eqn.effects:
        raise pickle.PicklingError(f"{eqn.primitive.name} has an effect on this process")
    params, stack = eqn.params, eqn.source_info.name_stack
    if eqn.primitive.name in DERIVED:
        params = {k: v if is_jaxpr(v) or isinstance(v, int) else None for k, v in params.items()}
    return equation, (list(eqn.invars), list(eqn.outvars), eqn.primitive, params, eqn.effects, stack, context(eqn))


def context(eqn: Eqn) -> Any:
    """What it is rebuilt from."""
    ctx = eqn.ctx
    if ctx.compute_type is not None or ctx.cur_abstract_mesh.axis_names:
        raise pickle.PicklingError(f"{eqn.primitive.name} is for a part of the machine: {ctx!r}")
    return ctx.threefry_partitionable, tuple(sorted((ctx.xla_metadata or {}).items()))


def equation(
    invars: Any, outvars: Any, primitive: Any, params: Any, effects: Any, stack: Any, context: tuple[bool, Any]
) -> Eqn:
    info = siu.new_source_info().replace(name_stack=stack)
    return jec.new_jaxpr_eqn(invars, outvars, primitive, params, effects, info, context_for(*context))


@cache
def context_for(threefry_partitionable: bool, metadata: tuple[tuple[str, Any], ...]) -> Any:
    """That of an equation which is traced in it."""
    with jax.threefry_partitionable(threefry_partitionable), set_xla_metadata(**dict(metadata)):
        (eqn,) = jax.make_jaxpr(jax.lax.neg)(0.0).jaxpr.eqns
    return eqn.ctx


def carried_aval(aval: ShapedArray) -> Any:
    parts = aval.shape, aval.dtype, aval.weak_type
    if ShapedArray(*parts) != aval:
        raise pickle.PicklingError(f"{aval} lies on a part of the machine")
    return ShapedArray, parts


def carried_jaxpr(jaxpr: Any) -> Any:
    """A bare one, or from JAX 0.11 on one that is closed."""
    consts = list(getattr(jaxpr, "consts", ()))
    if consts:
        raise pickle.PicklingError("a jaxpr with constants")
    parts = list(jaxpr.constvars), list(jaxpr.invars), list(jaxpr.outvars), list(jaxpr.eqns)
    return jec.Jaxpr, (*parts, jaxpr.effects, jaxpr.debug_info)


def carried_closed(jaxpr: ClosedJaxpr) -> Any:
    if jaxpr.consts:
        raise pickle.PicklingError("a jaxpr with constants")
    return ClosedJaxpr, (jaxpr.jaxpr, [])


carried_rules: dict[type, Callable[[Any], Any]] = {
    ClosedJaxpr: carried_closed,
    jec.Jaxpr: carried_jaxpr,  # the same type from JAX 0.11 on
    Eqn: carried_eqn,
    ShapedArray: carried_aval,
}
