"""`fuse`: programs -> one fused program that can be called, compiled ahead of time and read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.bank import bank_structs, build_bank, default_device, on_device
from coalesce.bundle import Bundle
from coalesce.call import Caller
from coalesce.chain import compile_parts
from coalesce.clusters import WASTE_BOUND
from coalesce.costs import Costs, device_of
from coalesce.errors import PlanError, TraceError
from coalesce.explain import bundle_text, explain
from coalesce.family import find_families, holders_of, leaf_tokens
from coalesce.kernels import choose
from coalesce.lower import lower
from coalesce.passes.bundle_pipeline import BundleStep, plan, POLICIES
from coalesce.passes.pipeline import normalise, Normalised
from coalesce.program import Program
from coalesce.report import Report, report_of
from coalesce.staged import Staged
from coalesce.tuning import Database, Tuned, tuned_on, UNTUNED

PLATFORMS = ("cpu", "gpu")  # that there are kernels and costs for


def fuse(
    programs: Sequence[Program],
    *,
    policy: str = "auto",
    waste_bound: float = WASTE_BOUND,
    within_program: bool = False,
    pack_unbounded_loops: bool = False,
    costs: Costs | None = None,
    choose_kernel: Callable[..., str] = choose,
    launches: bool = False,
    tuned: Database | str | Path | bool | None = None,
    executables: int | None = None,
    platform: str | None = None,
    strict: bool = False,
) -> Fused:
    """One program that runs all the given ones, with equal work of equal programs in shared superkernels.

    Weights are prepared and stacked here, once; the caller's arrays are not kept.

    Args:
      programs: what `trace` gave, in any mix; names must differ.
      policy: what runs together across families, whose tenants run different programs. "auto": what the cost model
        predicts to win; "always": whatever is legal within the waste bound; "never": nothing.
      waste_bound: the largest share of an op's FLOPs in a superkernel that may be padding, in [0, 1).
      within_program: also pack independent equal ops of one program, such as the layers of two towers. What reads one
        operand, as the Q, K and V of attention do, is one op anyway.
      pack_unbounded_loops: also batch while loops whose trip count depends on the lane. One lane that never ends
        (a NaN in its predicate, say) then keeps all lanes from ending; and lanes that are done still run the loops
        inside, as under `jax.vmap`, on the values they ended with.
      costs: predictions for the device that will run it; those of the default device, or of the platform, unless given.
      choose_kernel: (HeavyOp, number of problems, platform) -> a name in coalesce.kernels.KERNELS.
      launches: let ops of different programs share a kernel launch as they are, whatever their shapes, where `policy`
        and their kernels allow it. On a GPU "auto" then pads and stacks only what cannot.
      tuned: measured kernels and block sizes, used where the default device is of the kind that they were measured on,
        or of its kin (an H100 takes an H200's):
        None: what Coalesce brings along, under the entries of the user's own database; False: none; or a database or
        its file. A `choose_kernel` goes before them, and its kernels get the blocks that were tuned for them.
      executables: in how many the program is compiled, as far as there are places to cut it, each launched while those
        before it run. None: as many as are predicted to win; on a CPU one.
      platform: what kernels are chosen for; the default backend's unless given.
      strict: run JAX's own type check after every pass (for tests and for writing passes; slow).

    Raises:
      PlanError: no programs, two of one name, an option that means nothing, a program of 64-bit types without
        jax_enable_x64, a weight that was deleted (donated) since it was traced, or a kernel that does not support an
        op.
      TuningError: the file of a tuning database is broken or of another format, or `tuned` is something else.
      PassError: a compiler pass failed; it names the pass, those before it and the tenant.
    """
    if isinstance(programs, Program):
        raise PlanError(f"fuse got one program, {programs.name!r}; give it a list of them")
    programs = list(programs)
    check_names(programs)
    if policy not in POLICIES:
        raise PlanError(f"policy is {policy!r}; expected one of {', '.join(map(repr, POLICIES))}")
    if executables is not None and (not isinstance(executables, int | np.integer) or executables < 1):
        raise PlanError(f"executables is {executables!r}; a program is compiled in one or more, or None for what wins")
    if not 0 <= waste_bound < 1:
        raise PlanError(f"waste_bound is {waste_bound}; it is a share of the work and lies in [0, 1)")
    if platform not in (None, *PLATFORMS, jax.default_backend()):
        raise PlanError(f"platform is {platform!r}; expected one of {', '.join(map(repr, PLATFORMS))}, or None")
    check_usable(programs)
    memo: dict[int, Normalised] = {}
    normalised = []
    leaves = leaf_tokens(programs)
    holders = holders_of(programs, leaves)
    for program in programs:
        # Tenants with one traced function differ in weights alone: the passes run once for all of them.
        done = memo.get(id(program.jaxpr))
        if done is None:
            done = memo[id(program.jaxpr)] = normalise(program.held_by(holders[id(program.jaxpr)]), strict=strict)
        normalised.append(program.with_jaxpr(done.program.jaxpr, done.program.prepare))
    bundle = Bundle(tuple(p.name for p in programs), find_families(normalised, leaves))
    measured = default_tuned(tuned, platform)
    steps = plan(
        bundle,
        platform=platform or jax.default_backend(),
        costs=costs or default_costs(platform, measured),
        policy=policy,
        waste_bound=waste_bound,
        choice=choose_kernel,
        launches=launches,
        tuned=measured,
        within_program=within_program,
        pack_unbounded_loops=pack_unbounded_loops,
        executables=executables,
    )
    histories = tuple(memo[id(p.jaxpr)] for p in programs)
    bank = None if any(p.abstract for p in programs) else build_bank(steps[-1].bundle, normalised)
    return Fused(tuple(normalised), histories, steps, bank)


def default_tuned(given: Database | str | Path | bool | None, platform: str | None) -> Tuned:
    """What was measured on the kind of the default device; nothing, if another platform is planned for."""
    here = platform in (None, jax.default_backend())
    tuned = tuned_on(default_device().device_kind, given if here or given is not None else False)
    return tuned if here else UNTUNED


def default_costs(platform: str | None, tuned: Tuned) -> Costs:
    """Predictions for the default device, or for a usual one of another platform."""
    if platform in (None, jax.default_backend()):
        device = default_device()
        return Costs(device_of(device.platform, device.device_kind), tuned=tuned)
    return Costs(device_of(platform))


def check_names(programs: Sequence[Program]) -> None:
    if not programs:
        raise PlanError("fuse got no programs; give it what coalesce.trace returned, as a list")
    for i, program in enumerate(programs):
        if not isinstance(program, Program):
            raise PlanError(f"programs[{i}] is a {type(program).__name__}; expected what coalesce.trace returns")
    names = [p.name for p in programs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlanError(f"two tenants are called {twice[0]!r}; give each its own name in coalesce.trace(..., name=)")


def check_usable(programs: Sequence[Program]) -> None:
    for program in programs:
        for leaf in program.leaves:
            if isinstance(leaf.value, jax.Array) and leaf.value.is_deleted():
                raise PlanError(
                    f"tenant {program.name!r}: params{leaf.path} was deleted (donated?) since it was traced; "
                    "trace the tenant again with arrays that live"
                )
        avals = [s.aval for s in (*program.leaves, *program.inputs, *program.outputs)]
        wide = [a for a in avals if not J.is_key(a) and jax.dtypes.canonicalize_dtype(a.dtype) != a.dtype]
        if wide:
            raise PlanError(
                f"tenant {program.name!r} was traced with jax_enable_x64 and has {J.short(wide[0])}; "
                "fuse and call it with that option too"
            )


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
        self._bank = bank
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
        compiled = self._compiled if self._compiled is not None else self.compile()
        if len(self.bundle.starts) > 1:  # a part of several has run when a later one refuses what it reads
            flat = on_device(flat)
        try:
            results = compiled(bank, flat)
        except TypeError:
            if not any(isinstance(x, Tracer) for x in flat):
                raise
            results = self._function(bank, flat)  # under jit, vmap or grad: a part of the caller's program
        except ValueError:
            placed = on_device(flat)
            if all(a is b for a, b in zip(placed, flat, strict=True)):
                raise
            results = compiled(bank, placed)  # inputs lay on another device
        return self._caller.unflatten(results)

    def staged(self) -> Staged:
        """The same program for requests and results that lie stacked by family.

        Raises:
          TraceError: some program was traced from ShapeDtypeStructs and has no weights.
        """
        return Staged(self.bundle, self._caller, self._weights())

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
        """JAX's Lowered for the default device, of the program in one executable."""
        with J.precision_as_traced():
            return jax.jit(self._function).lower(*self._structs())

    def compile(self, compiler_options: dict[str, Any] | None = None) -> Any:
        """Compile ahead of time, for later calls too; returns JAX's Compiled, or a `Chain` of several."""
        if self._compiled is None or compiler_options is not None:
            parts = len(self.bundle.starts)
            self._compiled = compile_parts(self._function, self._structs(), parts, compiler_options)
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
        return bank_structs(self.bundle), self._caller.structs
