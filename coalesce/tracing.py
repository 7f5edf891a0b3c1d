"""A JAX function and its params -> Program.

Weights and request inputs are told apart by position. Arrays that the function closes over become weights too.
PRNG keys are staged as their key data, so that weights and inputs are plain arrays; leaves of params that are not
arrays (equinox's activation functions, say) are closed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.errors import TraceError
from coalesce.program import Leaf, Program, Slot

NOT_TAKEN = (TypeError, ValueError, OverflowError)  # what JAX says of what only looks like an array, or like a number

EFFECTS = (
    "ordered and I/O effects cannot be fused. Use jax.debug.callback(ordered=False) or jax.pure_callback, or move the "
    "call out of the function"
)
REFERRING = frozenset({"InternalMutableArrayEffect", "ReadEffect", "WriteEffect", "AccumEffect"})
REFERENCES = "references (jax.new_ref) cannot be fused. Use values instead, which array.at[...] changes"


def trace(
    fn: Callable[..., Any], params: Any, *example_inputs: Any, name: str = "tenant", shared: Any = None
) -> Program:
    """Stage `fn(params, *inputs)` to a Program; `fn` runs once, on tracers, and no array is read.

    Args:
      fn: a JAX function of `params` and inputs that returns a pytree of arrays. Tenants that pass the same function
        object and shapes share one trace. As with `jax.jit`, what `fn` closes over is read when that object is first
        traced: a global or an attribute that changed since needs a new function object.
      params: a pytree of arrays, or of ShapeDtypeStructs: then the program can be fused and inspected, not called.
      *example_inputs: pytrees of arrays or ShapeDtypeStructs; their shapes and dtypes are the tenant's request shape.
      name: the tenant's name in texts and errors.
      shared: a subtree of `params` (the same leaves) that other tenants have too, such as a common backbone. Tenants
        whose shared leaves are equal keep one copy. Leaves that are the same array object are found without it.

    Raises:
      TraceError: `fn` cannot be staged, has an ordered or I/O effect, or `shared` is not a part of `params`.
    """
    if not isinstance(name, str):
        raise TraceError(f"tenant {name!r}: a name is a str, not a {type(name).__name__}")
    if not callable(fn):
        raise TraceError(f"tenant {name!r}: fn is a {type(fn).__name__}; give a function of (params, *inputs) first")
    param_leaves, params_tree = jax.tree_util.tree_flatten_with_path(params)
    is_array = [staged(leaf) for _, leaf in param_leaves]
    arrays = [leaf for (_, leaf), ok in zip(param_leaves, is_array, strict=True) if ok]
    in_leaves, in_tree = jax.tree_util.tree_flatten_with_path(example_inputs)
    for path, leaf in in_leaves:
        if not staged(leaf):
            raise TraceError(
                f"tenant {name!r}: example input{jax.tree_util.keystr(path)} is a {type(leaf).__name__}; expected an "
                "array or a ShapeDtypeStruct. Close over what is not an array"
            )
    check_leaves(name, "params", [pair for pair, ok in zip(param_leaves, is_array, strict=True) if ok])
    check_leaves(name, "example input", in_leaves)
    if all(is_array):
        call, args = fn, (abstract(params), *abstract(example_inputs))
    else:
        call, args = hold_static(fn, params_tree, [leaf for _, leaf in param_leaves], is_array), (
            [abstract(leaf) for leaf in arrays], *abstract(example_inputs))  # fmt: skip
    try:
        jaxpr, out = J.stage(call, *args)
    except Exception as e:
        raise TraceError(f"tenant {name!r}: {describe(fn)} cannot be traced: {type(e).__name__}: {e}") from e
    refuse_effects(name, jaxpr)
    jaxpr, constants = J.separate_consts(jaxpr)
    out_leaves, out_tree = jax.tree_util.tree_flatten_with_path(out)
    declared = declared_shared(name, [leaf for _, leaf in param_leaves], shared)
    paths = [jax.tree_util.keystr(path) for (path, _), ok in zip(param_leaves, is_array, strict=True) if ok]
    leaves = [constant_leaf(i, value) for i, value in enumerate(constants)]
    leaves += [param_leaf(p, leaf, id(leaf) in declared) for p, leaf in zip(paths, arrays, strict=True)]
    return Program(
        name=name,
        jaxpr=stage_keys(jaxpr),
        leaves=tuple(leaves),
        inputs=tuple(slot(jax.tree_util.keystr(path), abstract(leaf)) for path, leaf in in_leaves),
        in_tree=in_tree,
        outputs=tuple(
            slot(jax.tree_util.keystr(p), v.aval) for (p, _), v in zip(out_leaves, J.outvars(jaxpr), strict=True)
        ),
        out_tree=out_tree,
    )


def staged(leaf: Any) -> bool:
    """Whether a leaf is traced, as `jax.jit` would, rather than closed over."""
    return isinstance(leaf, bool | int | float | complex) or (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))


def abstract(tree: Any) -> Any:
    """The pytree with ShapeDtypeStructs for leaves, weak types kept."""
    return jax.tree.map(struct, tree)


def struct(leaf: Any) -> jax.ShapeDtypeStruct:
    aval = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def check_leaves(name: str, what: str, leaves: Sequence[tuple[Any, Any]]) -> None:
    """Raise TraceError for leaves that look like arrays and are none to JAX: strings, objects, other libraries'."""
    for path, leaf in leaves:
        try:
            struct(leaf)
        except NOT_TAKEN as e:
            raise TraceError(
                f"tenant {name!r}: {what}{jax.tree_util.keystr(path)} is a {type(leaf).__name__} that JAX does not "
                f"take ({e}); convert it to a NumPy or JAX array of numbers"
            ) from e


def hold_static(fn: Callable[..., Any], tree: Any, leaves: list[Any], is_array: list[bool]) -> Callable[..., Any]:
    def call(arrays: list[Any], *inputs: Any) -> Any:
        rest = iter(arrays)
        return fn(
            tree.unflatten([next(rest) if ok else leaf for leaf, ok in zip(leaves, is_array, strict=True)]), *inputs
        )

    return call


def describe(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", None) or repr(fn)


def refuse_effects(name: str, jaxpr: ClosedJaxpr) -> None:
    """Unordered debug callbacks may run in any order and any number of times; nothing else with an effect may.

    An equation without effects keeps what is inside to itself, as a Pallas kernel does the reads of its own references.
    """
    for eqn in jaxpr.jaxpr.eqns:
        if not eqn.effects:
            continue
        for sub in J.subjaxprs(eqn):
            refuse_effects(name, sub)
        bad = sorted(type(effect).__name__ for effect in eqn.effects if type(effect).__name__ != "DebugEffect")
        if bad:
            raise TraceError(
                f"tenant {name!r}: equation {eqn.primitive.name} at {J.source(eqn) or 'an unknown line'} has the "
                f"effect {', '.join(bad)}; {REFERENCES if REFERRING.issuperset(bad) else EFFECTS}"
            )


def declared_shared(name: str, leaves: list[Any], shared: Any) -> set[int]:
    ids = {id(leaf) for leaf in leaves}
    chosen = {id(leaf): path for path, leaf in jax.tree_util.tree_leaves_with_path(shared)}
    for leaf, path in chosen.items():
        if leaf not in ids:
            raise TraceError(
                f"tenant {name!r}: shared{jax.tree_util.keystr(path)} is not a leaf of params; pass a subtree of the "
                "params themselves, such as shared=params['backbone']"
            )
    return set(chosen)


def param_leaf(path: str, leaf: Any, shared: bool) -> Leaf:
    aval = slot(path, abstract(leaf)).aval
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return Leaf(path, aval, None, shared)
    return Leaf(path, aval, jax.random.key_data(leaf) if J.is_key(jax.typeof(leaf)) else leaf, shared)


def constant_leaf(index: int, value: Any) -> Leaf:
    key = J.is_key(jax.typeof(value))
    data = jax.random.key_data(value) if key else value if isinstance(value, jax.Array) else np.asarray(value)
    return Leaf(f"constant {index}", abstract(data), data, constant=True)


def slot(path: str, aval: Any) -> Slot:
    if not J.is_key(aval):
        return Slot(path, J.aval_struct(aval))
    impl, data = J.key_layout(aval)
    return Slot(path, data, impl)


def stage_keys(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """Key arguments become their data, wrapped on entry; key results are unwrapped."""
    ins, outs = J.invars(jaxpr), J.outvars(jaxpr)
    if not any(J.is_key(v.aval) for v in [*ins, *outs]):
        return jaxpr
    splicer, args, atoms = J.Splicer(), [], []
    for var in ins:
        arg = J.fresh(var)
        if J.is_key(var.aval):
            impl, data = J.key_layout(var.aval)
            wrap, _ = J.stage(lambda d, impl=impl: jax.random.wrap_key_data(d, impl=impl), data)
            arg = J.fresh(J.invars(wrap)[0])
            atoms += splicer.inline(wrap, [arg])
        else:
            atoms.append(arg)
        args.append(arg)
    results = splicer.inline(jaxpr, atoms)
    for i, (var, atom) in enumerate(zip(outs, results, strict=True)):
        if J.is_key(var.aval):
            unwrap, _ = J.stage(jax.random.key_data, J.key_struct(var.aval))
            results[i] = splicer.inline(unwrap, [atom])[0]
    return J.close(args, splicer.eqns, results)
