"""`Fused`: what `fuse` gives, a fused program that can be called, compiled ahead of time and read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.bank import bank_structs, default_device, on_device
from coalesce.bundle import Bundle
from coalesce.call import Caller
from coalesce.chain import compile_parts
from coalesce.errors import TraceError
from coalesce.explain import bundle_text, explain
from coalesce.lower import lower
from coalesce.passes.bundle_pipeline import BundleStep
from coalesce.passes.pipeline import Normalised
from coalesce.passes.side_by_side import options_of
from coalesce.program import Program
from coalesce.report import Report, report_of
from coalesce.staged import Staged


class Fused:
    """Many tenants' programs as one. Call it with each tenant's inputs, in the order given to `fuse`."""

    def __init__(
        self,
        programs: tuple[Program, ...],
        histories: tuple[Normalised, ...],
        steps: tuple[BundleStep, ...],
        bank: list[jax.Array] | None,
    ) -> None:
        self._programs = tuple(p.without_values() for p in programs)
        self._no_weights = next((p.name for p in programs if p.abstract), None)
        self._histories = histories
        self._steps = steps
        self._bank, self._device = bank, default_device()  # where it runs, also when another is the default
        self._compiled: Any = None
        self._caller = Caller(self._programs)

    def __call__(self, inputs: Any) -> list[Any]:
        """`inputs[i]` is the tuple of inputs of program i; returns each program's outputs, in its own pytree.

        Raises:
          InvalidInput: an input is not what its tenant was traced with; nothing has run then.
          TraceError: some program was traced from ShapeDtypeStructs and has no weights.
        """
        bank = self._weights()
        flat = self._caller.flatten(inputs)
        if J.is_jit_disabled():
            return self._caller.unflatten(self._function(bank, on_device(flat, self._device)))
        compiled = self._compiled if self._compiled is not None else self.compile()
        if len(self.bundle.starts) > 1:  # a part of several has run when a later one refuses what it reads
            flat = on_device(flat, self._device)
        try:
            results = compiled(bank, flat)
        except TypeError:
            if not any(isinstance(x, Tracer) for x in flat):
                raise
            results = self._function(bank, flat)  # under jit, vmap or grad: a part of the caller's program
        except ValueError:
            placed = on_device(flat, self._device)
            if all(a is b for a, b in zip(placed, flat, strict=True)):
                raise
            results = compiled(bank, placed)  # inputs lay on another device
        return self._caller.unflatten(results)

    def staged(self) -> Staged:
        """The same program for requests and results that lie stacked by family.

        Raises:
          TraceError: some program was traced from ShapeDtypeStructs and has no weights.
        """
        return Staged(self.bundle, self._caller, self._weights(), self._device)

    def _weights(self) -> list[jax.Array]:
        if self._bank is None:
            raise TraceError(
                f"tenant {self._no_weights!r} was traced from ShapeDtypeStructs and has no weights; "
                "trace it with its arrays"
            )
        return self._bank

    @property
    def bundle(self) -> Bundle:
        """The plan: families, schedule and weight arrays."""
        return self._steps[-1].bundle

    @property
    def steps(self) -> tuple[BundleStep, ...]:
        """The bundle after each pass, with the pass's name and time."""
        return self._steps

    @property
    def bank(self) -> tuple[jax.Array, ...]:
        """The stacked weights: slabs, then the arrays that lie in none; empty for abstract programs."""
        return tuple(self._bank or ())

    @cached_property
    def report(self) -> Report:
        """Counts of heavy ops and superkernels, over all tenants and for each."""
        return report_of(self.bundle)

    def explain(self) -> str:
        """The programs after each pass, every pack, and every heavy op left alone with the reason."""
        return explain(self._programs, self._histories, self._steps)

    @cached_property
    def jaxpr(self) -> ClosedJaxpr:
        """The rewritten program: (bank, inputs) -> outputs, with a named call for each superkernel."""
        with J.precision_as_traced():
            return J.stage(self._function, *self._structs())[0]

    def __str__(self) -> str:
        return bundle_text(self.bundle)

    def lower(self) -> Any:
        """JAX's Lowered for the default device, of the program in one executable, without the options of its plan."""
        with J.precision_as_traced():
            return jax.jit(self._function).lower(*self._structs())

    def compile(self, compiler_options: dict[str, Any] | None = None) -> Any:
        """Compile ahead of time, for later calls too; returns JAX's Compiled, or a `Chain` of several.

        Options that the plan needs (`passes/side_by_side.py`) are added to those given, which go first.
        """
        if self._compiled is None or compiler_options is not None:
            parts, options = len(self.bundle.starts), options_of(self.bundle, compiler_options)
            with jax.default_device(self._device):
                self._compiled = compile_parts(self._function, self._structs(), parts, options)
        return self._compiled

    def cost_analysis(self) -> Any:
        """XLA's cost analysis of the compiled program; a list, if it is several executables."""
        return self.compile().cost_analysis()

    def memory_analysis(self) -> Any:
        """XLA's memory analysis of the compiled program; a list, if it is several executables."""
        return self.compile().memory_analysis()

    def as_text(self) -> str:
        """The optimised HLO of the compiled program."""
        return self.compile().as_text()

    @cached_property
    def _function(self) -> Callable[..., Any]:
        run, caller = lower(self.bundle), self._caller

        def fused(bank: Sequence[Any], flat: Sequence[Any]) -> list[Any]:
            return caller.join(run(bank, caller.split(flat)))

        return fused

    def _structs(self) -> tuple[list[Any], list[Any]]:
        self._caller.check_option()
        return bank_structs(self.bundle), self._caller.structs
