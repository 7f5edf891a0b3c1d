"""A fused program whose requests and results lie stacked by family, as a server wants them: one array for each input
and each output of a family, however many tenants it has. So a round is a few transfers and a call of few arguments.

    requests  --stage-->  inputs [L, ...]  --call-->  outputs [L, ...]  --unstage-->  each tenant's own results

`capture` makes something of it that is launched without JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from coalesce import jaxpr as J
from coalesce.bank import bank_structs, on_device
from coalesce.bundle import Bundle
from coalesce.call import Caller, is_gone
from coalesce.capture.aside import aside_of
from coalesce.captured import ByCall, Captured, InGraph, Running, Stacks
from coalesce.chain import compile_parts
from coalesce.errors import InvalidInput
from coalesce.lower import lower_stacked
from coalesce.passes.components import components
from coalesce.passes.side_by_side import options_of


class Staged:
    """`Fused.staged()` makes it. L counts the tenants of a family, in the order of `families[f]`."""

    def __init__(self, bundle: Bundle, caller: Caller, bank: Sequence[jax.Array], device: Any) -> None:
        self._bundle, self._caller, self._bank, self._device = bundle, caller, bank, device
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
        with jax.default_device(self._device):
            return jax.device_put(self._stacked(requests))

    def _stacked(self, requests: Any) -> Stacks:
        """What lies on the host stays there."""
        inputs = self._caller.split(on_device(self._caller.flatten(requests), self._device))
        return [
            [in_one([inputs[ln.tenant][ln.inputs[i]] for ln in family.lanes]) for i in range(len(family.inputs))]
            for family in self._bundle.families
        ]

    def __call__(self, inputs: Stacks) -> Stacks:
        """The outputs of what `stage` gave, or of arrays on its device that lie as it lays them.

        Raises:
          InvalidInput: there are other arrays, or of other shapes or dtypes.
        """
        self._check(inputs)
        if J.is_jit_disabled() or any(isinstance(x, Tracer) for own in inputs for x in own):
            return self._function(self._bank, inputs)  # under jit, vmap or grad: a part of the caller's program
        compiled = self._compiled if self._compiled is not None else self.compile()
        return compiled(self._bank, inputs)

    def _check(self, inputs: Stacks) -> None:
        self._caller.check_option()
        if len(inputs) != len(self._structs):
            raise InvalidInput(
                f"got staged inputs of {len(inputs)} families, expected {len(self._structs)}, as stage() gives"
            )
        for f, (own, structs) in enumerate(zip(inputs, self._structs, strict=True)):
            if len(own) != len(structs):
                raise InvalidInput(
                    f"{self._family(f)}: got {len(own)} arrays, expected {len(structs)}, as stage() gives"
                )
            for i, (x, want) in enumerate(zip(own, structs, strict=True)):
                if getattr(x, "shape", None) != want.shape or getattr(x, "dtype", None) != want.dtype:
                    got = J.struct_short(x) if hasattr(x, "dtype") and hasattr(x, "shape") else type(x).__name__
                    raise InvalidInput(
                        f"{self._family(f)}, input {i}: got {got}, expected {J.struct_short(want)}, as stage() gives"
                    )
                if is_gone(x):
                    raise InvalidInput(f"{self._family(f)}, input {i} was deleted (donated?); stage it again")

    def _family(self, index: int) -> str:
        names = self.families[index]
        return f"family {index} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"

    def unstage(self, outputs: Stacks) -> list[Any]:
        """Each tenant's results in its own pytree: NumPy arrays, and keys on the device.

        They are views of one array for each output of a family, which lives as long as any of them; do not write to
        them.
        """
        values: list[list[Any]] = [[] for _ in self._bundle.tenants]
        for family, own in zip(self._bundle.families, jax.device_get(outputs), strict=True):
            for i, ln in enumerate(family.lanes):
                values[ln.tenant] = [x[i, ...] for x in own]
        return self._caller.unflatten([x for tenant in values for x in tenant])

    def capture(self, requests: Any) -> Captured:
        """The same program to be launched without JAX: on an NVIDIA GPU as one CUDA graph, whose inputs and outputs lie
        where they are for every launch; `requests` are the first. It has memory of its own for these, shares what it
        computes in with all others that are captured, and reads the same weights. Before the first launch its outputs
        mean nothing.

        Families that share no kernel run at once where the plan has them side by side; `fuse(captured=True)` plans so
        that they do where that wins.

        Raises:
          InvalidInput: an input is not what its tenant was traced with.
          CaptureError: the program does what no CUDA graph can, such as to look at a value on the host, as a loop does
            that runs until its values say so. Call it instead.
        """
        inputs = self.stage(requests)
        with jax.default_device(self._device):
            return Captured(self._running(inputs), self._stacked, self.unstage)

    def _running(self, inputs: Stacks) -> Running:
        parts = [list(range(len(self._bundle.families)))]
        if self._bundle.beside:
            found = [list(own.families) for own in components(self._bundle.schedule)]
            rest = set(parts[0]).difference(*found)  # that compute nothing
            parts = [*found[1:], [*found[0], *rest]] if found else parts
        asides = [aside_of(self._device, number) for number in range(len(parts))]
        clients = [aside for aside in asides if aside is not None]
        if not clients:
            self.compile()
            return ByCall(self, inputs)
        with J.precision_as_traced():
            outputs = jax.eval_shape(self._function, bank_structs(self._bundle), self._structs)
        run = partial(lower_stacked, self._bundle)
        return InGraph(run, self._bank, inputs, outputs, parts, clients, compile_donating)

    def compile(self, compiler_options: dict[str, Any] | None = None) -> Any:
        """Compile ahead of time, for later calls too; returns JAX's Compiled, or a `Chain` of several.

        Options that the plan needs (`passes/side_by_side.py`) are added to those given, which go first.
        """
        if self._compiled is None or compiler_options is not None:
            self._caller.check_option()
            structs, parts = (bank_structs(self._bundle), self._structs), len(self._bundle.starts)
            options = options_of(self._bundle, compiler_options)
            with jax.default_device(self._device):
                self._compiled = compile_parts(self._function, structs, parts, options)
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


def compile_donating(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """JAX's Compiled, which leaves its results in the memory of its last argument."""
    jitted = jax.jit(function, donate_argnums=len(arguments) - 1, keep_unused=True)
    with J.precision_as_traced():
        return jitted.lower(*arguments).compile(compiler_options=options)


def in_one(values: Sequence[Any]) -> Any:
    return jnp.stack(values) if any(isinstance(x, jax.Array) for x in values) else np.stack(values)
