"""`fuse`: programs -> one fused program, by the passes in their order and with the weights prepared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from coalesce import jaxpr as J
from coalesce.bank import build_bank, default_device
from coalesce.bundle import Bundle
from coalesce.clusters import WASTE_BOUND
from coalesce.costs import Costs, device_of
from coalesce.errors import PlanError
from coalesce.family import find_families, holders_of, leaf_tokens
from coalesce.fused import Fused
from coalesce.heavy import HEAVY
from coalesce.kernels import choose
from coalesce.passes import bundle_pipeline, pipeline
from coalesce.passes.bundle_pipeline import plan, POLICIES
from coalesce.passes.pipeline import name_of, normalise, Normalised, PROGRAM_PASSES
from coalesce.program import Program, why_wide
from coalesce.tuning import Database, Tuned, tuned_on, UNTUNED

OPTIONAL_PASSES = (*pipeline.OPTIONAL, *bundle_pipeline.OPTIONAL)
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
    side_by_side: bool | np.bool_ | None = None,
    captured: bool | np.bool_ = False,
    platform: str | None = None,
    without: Sequence[str] = (),
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
      side_by_side: whether independent kernels run at once on a GPU, as branches of one CUDA graph: those of different
        families above all, which then share no memory for what they compute on the way. None: where it is predicted to
        win for several families, also over what they could share by `policy` "auto".
      captured: whether it is planned for `Staged.capture`, which launches it without JAX: what a launch costs the host
        is no reason then to pack families together, or to cut the program. On a CPU it makes no difference.
      platform: what kernels are chosen for; the default backend's unless given.
      without: passes to leave out, of `coalesce.compile.OPTIONAL_PASSES`: to see what each brings, or is to blame for.
      strict: run JAX's own type check after every pass (for tests and for writing passes; slow).

    Raises:
      PlanError: no programs, two of one name, an option that means nothing, a program of 64-bit types without
        jax_enable_x64, a weight that was deleted (donated) since it was traced, or is itself traced (inside `jax.jit`),
        or a kernel that does not support an op.
      TuningError: the file of a tuning database is broken or of another format, or `tuned` is something else.
      PassError: a compiler pass failed; it names the pass, those before it and the tenant.
    """
    if isinstance(programs, Program):
        raise PlanError(f"fuse got one program, {programs.name!r}; give it a list of them")
    programs = list(programs)
    check_names(programs)
    check_options(policy, waste_bound, costs, choose_kernel, platform, without)
    check_executables(executables, side_by_side, captured)
    check_usable(programs)
    passes = [run for run in PROGRAM_PASSES if name_of(run) not in without]
    memo: dict[int, Normalised] = {}
    normalised = []
    leaves = leaf_tokens(programs)
    holders = holders_of(programs, leaves)
    for program in programs:
        # Tenants with one traced function differ in weights alone: the passes run once for all of them.
        done = memo.get(id(program.jaxpr))
        if done is None:
            done = memo[id(program.jaxpr)] = normalise(program.held_by(holders[id(program.jaxpr)]), passes, strict)
        normalised.append(program.with_jaxpr(done.program.jaxpr, done.program.prepare))
    check_wide(normalised, {*J.REGIONS, *HEAVY})
    bundle = Bundle(tuple(p.name for p in programs), find_families(normalised, leaves))
    measured = default_tuned(tuned, platform)
    predicted = costs or default_costs(platform, measured)
    steps = plan(
        bundle,
        platform=platform or jax.default_backend(),
        costs=predicted.captured if captured else predicted,
        policy=policy,
        waste_bound=waste_bound,
        choice=choose_kernel,
        launches=launches,
        tuned=measured,
        within_program=within_program,
        pack_unbounded_loops=pack_unbounded_loops,
        executables=executables,
        beside=None if side_by_side is None else bool(side_by_side),  # NumPy's too
        captured=bool(captured),
        without=without,
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


def check_options(policy: Any, waste_bound: Any, costs: Any, choose_kernel: Any, platform: Any, without: Any) -> None:
    if policy not in POLICIES:
        raise PlanError(f"policy is {policy!r}; expected one of {', '.join(map(repr, POLICIES))}")
    if not (isinstance(waste_bound, int | float | np.number) and 0 <= waste_bound < 1):
        raise PlanError(f"waste_bound is {waste_bound}; it is a share of the work and lies in [0, 1)")
    if not (costs is None or isinstance(costs, Costs)):
        raise PlanError(f"costs is {costs!r}; give a coalesce.costs.Costs, or None for what is known of the device")
    if not callable(choose_kernel):
        raise PlanError(f"choose_kernel is {choose_kernel!r}; give a function of (op, problems, platform)")
    if platform not in (None, *PLATFORMS, jax.default_backend()):
        raise PlanError(f"platform is {platform!r}; expected one of {', '.join(map(repr, PLATFORMS))}, or None")
    listed = isinstance(without, Collection) and not isinstance(without, str)
    if not listed or any(name not in OPTIONAL_PASSES for name in without):
        raise PlanError(f"without is {without!r}; a list of passes is wanted, of {', '.join(OPTIONAL_PASSES)}")


def check_executables(executables: Any, side_by_side: Any, captured: Any) -> None:
    if executables is not None and (not isinstance(executables, int | np.integer) or executables < 1):
        raise PlanError(f"executables is {executables!r}; a program is compiled in one or more, or None for what wins")
    if side_by_side is not None and not isinstance(side_by_side, bool | np.bool_):
        raise PlanError(f"side_by_side is {side_by_side!r}; expected True, False, or None for what wins")
    if side_by_side and (executables or 1) > 1:
        raise PlanError(f"side_by_side=True is one executable, and executables is {executables}; leave one of them out")
    if not isinstance(captured, bool | np.bool_):
        raise PlanError(f"captured is {captured!r}; expected True or False")


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
        unreadable = next((leaf.unreadable for leaf in program.leaves if leaf.unreadable), "")
        if unreadable:
            raise PlanError(f"tenant {program.name!r}: {unreadable}")
    check_wide(programs, J.REGIONS)


def check_wide(programs: Sequence[Program], rebuilt: Collection[str]) -> None:
    """Also of weights as the passes leave them, which a tenant may have widened inside its function."""
    why = "" if J.takes_wide() else why_wide(programs, rebuilt)
    if why:
        raise PlanError(f"{why}; fuse and call it with that option too")
