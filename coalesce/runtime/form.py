"""A tenant's request shape: what its inputs must be, and how its results are given back."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from coalesce.call import checked, is_gone, rewrapped
from coalesce.errors import InvalidInput
from coalesce.program import Program, Slot


class Form:
    """`family` is its number in the scheduler's catalog, whose inputs are the tenant's own in the order `order`."""

    def __init__(self, program: Program, family: int, order: Sequence[int]) -> None:
        self.tenant, self.family = program.name, family
        self._order = None if tuple(order) == tuple(range(len(program.inputs))) else order
        self.inputs: tuple[Slot, ...] = program.inputs
        self._in_tree, self.out_tree = program.in_tree, program.out_tree
        self._outputs = program.outputs
        self._wants = [(slot.aval.shape, slot.aval.dtype) for slot in self.inputs]
        self._keys = any(slot.key_impl is not None for slot in program.inputs)
        flat = jax.tree.structure((0,) * len(self.inputs))
        self._is_flat = not self._keys and self._in_tree == flat  # each input is one array
        self._key_results = any(slot.key_impl is not None for slot in program.outputs)
        self.is_bare = not self._key_results and self.out_tree == jax.tree.structure(0)  # one array, in no container
        self.is_plain = not self._key_results and is_built_in(self.out_tree)  # made by no code of the tenant's

    def under(self, family: int) -> Form:
        """The same, whose family has another number."""
        other = copy(self)
        other.family = family
        return other

    def __str__(self) -> str:
        return ", ".join(f"{np.dtype(dtype).name}{list(shape)}" for shape, dtype in self._wants) or "nothing"

    def takes(self, inputs: tuple[Any, ...]) -> list[np.ndarray] | None:
        """The inputs, flat, if they are plainly the NumPy arrays that the tenant was traced with; else None."""
        wants = self._wants
        if self._is_flat and len(inputs) == len(wants) == 1:  # as for most
            (leaf,) = inputs
            return [leaf] if type(leaf) is np.ndarray and (leaf.shape, leaf.dtype) == wants[0] else None
        leaves = list(inputs) if self._is_flat else self._flattened(inputs)
        if leaves is None or len(leaves) != len(wants):
            return None
        for i, leaf in enumerate(leaves):
            if type(leaf) is not np.ndarray or (leaf.shape, leaf.dtype) != wants[i]:
                return None
        return leaves

    def _flattened(self, inputs: tuple[Any, ...]) -> list[Any] | None:
        if self._keys:
            return None
        leaves, tree = jax.tree.flatten(inputs)
        return leaves if tree == self._in_tree else None

    def accept(self, inputs: tuple[Any, ...]) -> list[np.ndarray]:
        """The inputs, flat, as NumPy arrays; raises InvalidInput, which names the argument."""
        leaves, tree = jax.tree.flatten(inputs)
        if tree != self._in_tree:
            raise InvalidInput(
                f"tenant {self.tenant!r}: inputs are {tree}, traced with {self._in_tree}; give one for each input "
                "after params"
            )
        traced = next((slot for x, slot in zip(leaves, self.inputs, strict=True) if isinstance(x, Tracer)), None)
        if traced is not None:
            raise InvalidInput(
                f"tenant {self.tenant!r}: input{traced.path} is traced, and a request needs values; send it outside of "
                "jax.jit, jax.grad and jax.vmap"
            )
        return [np.asarray(checked(self.tenant, x, slot)) for x, slot in zip(leaves, self.inputs, strict=True)]

    def ordered(self, flat: list[np.ndarray]) -> list[np.ndarray]:
        """Flat inputs as the family takes them."""
        return flat if self._order is None else [flat[i] for i in self._order]

    def result(self, values: Sequence[Any]) -> Any:
        """A lane's flat outputs in the tenant's own pytree."""
        if self.is_bare:
            return values[0]
        if self._key_results:
            values = [rewrapped(x, slot) for x, slot in zip(values, self._outputs, strict=True)]
        return self.out_tree.unflatten(values)


def example_of(program: Program, order: Sequence[int], inputs: tuple[Any, ...]) -> list[np.ndarray]:
    """An example's inputs, flat, in the order `order`; zeros for what says no more than its type."""
    leaves = jax.tree.leaves(inputs)

    def array(i: int) -> np.ndarray:
        leaf, slot = leaves[i], program.inputs[i]
        if isinstance(leaf, jax.ShapeDtypeStruct) or is_gone(leaf):
            return np.zeros(slot.aval.shape, slot.aval.dtype)
        return np.asarray(checked(program.name, leaf, slot))

    return [array(i) for i in order]


def is_built_in(tree: Any) -> bool:
    """Whether a pytree is of Python's own containers."""
    node = tree.node_data()
    return node is None or (node[0] in (tuple, list, dict, type(None)) and all(map(is_built_in, tree.children())))


def match(tenant: str, forms: Sequence[Form], inputs: tuple[Any, ...]) -> tuple[Form, list[np.ndarray]]:
    """The form that the inputs are of, and they as it takes them. The first does not take them at once.

    Raises:
      InvalidInput: they are of none; it names the argument, or all forms that there are.
    """
    for form in forms[1:]:
        flat = form.takes(inputs)
        if flat is not None:
            return form, flat
    if len(forms) == 1:
        return forms[0], forms[0].accept(inputs)
    for form in forms:
        try:
            return form, form.accept(inputs)
        except InvalidInput:
            continue
    got = ", ".join(described(leaf) for leaf in jax.tree.leaves(inputs))
    known = "; ".join(map(str, forms))
    raise InvalidInput(
        f"tenant {tenant!r}: inputs are {got}, none of the request shapes that it was added with: {known}. "
        "Pad to one of them, or add the tenant with another example"
    )


def described(leaf: Any) -> str:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    return f"{leaf.dtype}{list(leaf.shape)}"
