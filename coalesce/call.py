"""A call's arguments and results: pytrees of each tenant to the flat arrays of the fused program, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from coalesce import jaxpr as J
from coalesce.errors import InvalidInput
from coalesce.heavy import HEAVY
from coalesce.program import Program, Slot, why_wide

NO_ARRAYS = (jax.ShapeDtypeStruct, np.ma.MaskedArray)  # though they look like some: NumPy drops a mask in silence


class Caller:
    """The calling convention of a list of programs."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self.programs = programs
        self.structs = [slot.aval for p in programs for slot in p.inputs]
        self.in_tree = jax.tree.structure([p.in_tree.unflatten([0] * len(p.inputs)) for p in programs])
        self.out_tree = jax.tree.structure([p.out_tree.unflatten([0] * len(p.outputs)) for p in programs])
        self.shapes, self.dtypes = [s.shape for s in self.structs], [s.dtype for s in self.structs]
        self.why_wide = why_wide(programs, {*J.REGIONS, *HEAVY})
        self.key_inputs = any(slot.key_impl is not None for p in programs for slot in p.inputs)
        self.key_outputs = any(slot.key_impl is not None for p in programs for slot in p.outputs)

    def check_option(self) -> None:
        """Raises InvalidInput where some program's types are not there."""
        if self.why_wide and not J.takes_wide():
            raise InvalidInput(f"{self.why_wide}; call it with that option too")

    def flatten(self, inputs: Any) -> list[Any]:
        """Every tenant's inputs as one flat list of arrays; raises InvalidInput, naming tenant and argument."""
        self.check_option()
        if not self.key_inputs:  # the usual call, in one pass; whatever is not as traced is looked at one by one below
            leaves, tree = jax.tree.flatten(inputs)
            if (
                tree == self.in_tree
                and all(isinstance(leaf, jax.Array) for leaf in leaves)
                and [leaf.shape for leaf in leaves] == self.shapes
                and [leaf.dtype for leaf in leaves] == self.dtypes
                and alive(leaves)
            ):
                return leaves
        if not isinstance(inputs, list | tuple):
            raise InvalidInput(
                f"inputs is a {type(inputs).__name__}; give a list with a tuple of inputs for each tenant"
            )
        if len(inputs) != len(self.programs):
            names = ", ".join(p.name for p in self.programs)
            raise InvalidInput(
                f"got inputs for {len(inputs)} tenants, expected {len(self.programs)}: one tuple for each of {names}"
            )
        flat: list[Any] = []
        for program, given in zip(self.programs, inputs, strict=True):
            leaves, tree = jax.tree_util.tree_flatten(tuple(given) if isinstance(given, list) else given)
            if tree != program.in_tree:
                raise InvalidInput(
                    f"tenant {program.name!r}: inputs are {tree}, traced with {program.in_tree}; "
                    "give a tuple with one entry for each input after params"
                )
            flat.extend(checked(program.name, leaf, slot) for leaf, slot in zip(leaves, program.inputs, strict=True))
        return flat

    def split(self, flat: Sequence[Any]) -> list[list[Any]]:
        """The flat list, tenant by tenant."""
        parts, rest = [], iter(flat)
        for program in self.programs:
            parts.append([next(rest) for _ in program.inputs])
        return parts

    def join(self, outputs: Sequence[Sequence[Any]]) -> list[Any]:
        """All tenants' outputs in one list, with the weak types of their own runs."""
        return [
            J.set_weak_type(x, bool(slot.aval.weak_type))
            for program, values in zip(self.programs, outputs, strict=True)
            for x, slot in zip(values, program.outputs, strict=True)
        ]

    def unflatten(self, flat: Sequence[Any]) -> list[Any]:
        """Each tenant's outputs in its own pytree."""
        if not self.key_outputs:
            return self.out_tree.unflatten(flat)
        rest = iter(flat)
        return [p.out_tree.unflatten([rewrapped(next(rest), slot) for slot in p.outputs]) for p in self.programs]


def alive(leaves: Sequence[Any]) -> bool:
    """Whether all arrays are there; False of traced values too, which do not say."""
    try:
        return not any([x.is_deleted() for x in leaves])
    except jax.errors.ConcretizationTypeError:
        return False


def is_gone(leaf: Any) -> bool:
    """Whether it is an array that was deleted, as one that was donated; a traced value never is."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted()


def checked(tenant: str, leaf: Any, slot: Slot) -> Any:
    """An input as the array that the program takes."""
    want = slot.aval
    if is_gone(leaf):
        raise InvalidInput(f"tenant {tenant!r}: input{slot.path} was deleted (donated?); give one that lives")
    if slot.key_impl is not None:
        is_key = hasattr(leaf, "dtype") and J.is_key(leaf)
        if not is_key or str(jax.random.key_impl(leaf)) != str(slot.key_impl):
            raise InvalidInput(
                f"tenant {tenant!r}: input{slot.path} is not a PRNG key of {slot.key_impl}, as it was traced with"
            )
        leaf = jax.random.key_data(leaf)
    elif isinstance(leaf, bool | int | float | complex):
        leaf = number(tenant, leaf, slot)
    elif isinstance(leaf, NO_ARRAYS) or not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise InvalidInput(f"tenant {tenant!r}: input{slot.path} is a {type(leaf).__name__}, expected {J.short(want)}")
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        leaf = converted(tenant, leaf, slot)
    if leaf.shape == want.shape and leaf.dtype == want.dtype:
        return leaf
    if J.is_key(leaf) or leaf.shape != want.shape or jax.dtypes.canonicalize_dtype(leaf.dtype) != want.dtype:
        got = f"{leaf.dtype}{list(leaf.shape)}"
        raise InvalidInput(
            f"tenant {tenant!r}: input{slot.path} is {got}, traced with {np.dtype(want.dtype).name}{list(want.shape)}; "
            "cast or pad it, or trace another program for this request shape"
        )
    return np.asarray(leaf, want.dtype)


def converted(tenant: str, leaf: Any, slot: Slot) -> np.ndarray:
    """Another library's array, a column of a table say, as one of NumPy's own types."""
    try:
        array = np.asarray(leaf)
    except Exception as e:  # of that library
        why = f"{type(e).__name__}: {e}"
    else:
        if array.dtype != object:
            return array
        why = "NumPy makes objects of it"
    raise InvalidInput(
        f"tenant {tenant!r}: input{slot.path} is a {type(leaf).__name__} of {leaf.dtype} that is no NumPy array "
        f"({why}); convert it to {J.short(slot.aval)}"
    )


def number(tenant: str, value: bool | int | float | complex, slot: Slot) -> np.ndarray:
    """A Python number where a number of the same kind was traced; an int does for a float."""
    want = slot.aval
    fits = want.shape == () and np.can_cast(np.min_scalar_type(value), want.dtype, "same_kind")
    if not fits or isinstance(value, bool) != (want.dtype == np.bool_):
        raise InvalidInput(
            f"tenant {tenant!r}: input{slot.path} is the number {value!r}, traced with "
            f"{np.dtype(want.dtype).name}{list(want.shape)}; give a number of that kind"
        )
    try:
        return np.asarray(value, want.dtype)
    except OverflowError:
        raise InvalidInput(
            f"tenant {tenant!r}: input{slot.path} is the number {value!r}, too large for {np.dtype(want.dtype).name}"
        ) from None


def rewrapped(x: Any, slot: Slot) -> Any:
    return x if slot.key_impl is None else jax.random.wrap_key_data(x, impl=slot.key_impl)
