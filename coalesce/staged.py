"""A fused program whose requests and results lie stacked by family, as a server wants them: one array for each input
and each output of a family, however many tenants it has. So a round is a few transfers and a call of few arguments.

    requests  --stage-->  inputs [L, ...]  --call-->  outputs [L, ...]  --unstage-->  each tenant's own results
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coalesce import jaxpr as J
from coalesce.bank import bank_structs
from coalesce.bundle import Bundle
from coalesce.call import Caller
from coalesce.errors import InvalidInput
from coalesce.lower import lower_stacked

Stacks = list[list[Any]]  # of each family, in order, its inputs or outputs [L, ...], L its tenants


class Staged:
    """`Fused.staged()` makes it. L counts the tenants of a family, in the order of `families[f]`."""

    def __init__(self, bundle: Bundle, caller: Caller, bank: Sequence[jax.Array]) -> None:
        self._bundle, self._caller, self._bank = bundle, caller, bank
        self._compiled: Any = None

    @property
    def families(self) -> list[list[str]]:
        """The tenants of each family, by their places in its arrays."""
        return [[self._bundle.tenants[ln.tenant] for ln in family.lanes] for family in self._bundle.families]

    def stage(self, requests: Any) -> Stacks:
        """Each tenant's tuple of inputs, as `Fused` takes them, in one array on the device for each input of a family.

        What lies on the host is stacked there, and goes to the device in one batch of transfers.

        Raises:
          InvalidInput: an input is not what its tenant was traced with.
        """
        inputs = self._caller.split(self._caller.flatten(requests))
        stacks = [
            [in_one([inputs[ln.tenant][ln.inputs[i]] for ln in family.lanes]) for i in range(len(family.inputs))]
            for family in self._bundle.families
        ]
        return jax.device_put(stacks)

    def __call__(self, inputs: Stacks) -> Stacks:
        """The outputs of what `stage` gave, or of arrays that lie as it lays them.

        Raises:
          InvalidInput: there are other arrays, or of other shapes or dtypes.
        """
        leaves, tree = jax.tree.flatten(inputs)
        want, expected = self._flat_structs
        found = [(getattr(x, "shape", None), getattr(x, "dtype", None)) for x in leaves]
        if tree != expected or found != want:
            text = ", ".join(f"{np.dtype(dtype).name}{list(shape)}" for shape, dtype in want)
            raise InvalidInput(f"staged inputs are not what stage() gives; expected, for each family a list: {text}")
        compiled = self._compiled if self._compiled is not None else self.compile()
        return compiled(self._bank, inputs)

    def unstage(self, outputs: Stacks) -> list[Any]:
        """Each tenant's results in its own pytree, as views of one array on the host for each output of a family."""
        values: list[list[Any]] = [[] for _ in self._bundle.tenants]
        for family, own in zip(self._bundle.families, jax.device_get(outputs), strict=True):
            for i, ln in enumerate(family.lanes):
                values[ln.tenant] = [x[i] for x in own]
        return self._caller.unflatten([x for tenant in values for x in tenant])

    def compile(self, compiler_options: dict[str, Any] | None = None) -> Any:
        """Compile ahead of time, for later calls too; returns JAX's Compiled."""
        if self._compiled is None or compiler_options is not None:
            with J.precision_as_traced():
                lowered = jax.jit(self._function).lower(bank_structs(self._bundle), self._structs)
            self._compiled = lowered.compile(compiler_options=compiler_options)
        return self._compiled

    @cached_property
    def _function(self) -> Callable[..., Any]:
        run = lower_stacked(self._bundle)

        def staged(bank: Sequence[Any], inputs: Stacks) -> Stacks:
            return run(bank, inputs)

        return staged

    @cached_property
    def _structs(self) -> Stacks:
        structs = self._caller.split(self._caller.structs)

        def stack(tenant: int, position: int, lanes: int) -> jax.ShapeDtypeStruct:
            one = structs[tenant][position]
            return jax.ShapeDtypeStruct((lanes, *one.shape), one.dtype)

        return [
            [stack(family.lanes[0].tenant, position, family.width) for position in family.lanes[0].inputs]
            for family in self._bundle.families
        ]

    @cached_property
    def _flat_structs(self) -> tuple[list[Any], Any]:
        leaves, tree = jax.tree.flatten(self._structs)
        return [(s.shape, s.dtype) for s in leaves], tree


def in_one(values: Sequence[Any]) -> Any:
    return jnp.stack(values) if any(isinstance(x, jax.Array) for x in values) else np.stack(values)
