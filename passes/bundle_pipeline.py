"""The passes over a bundle, in order: families in, a schedule of packs with kernels and weight arrays out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from coalesce.bundle import Bundle
from coalesce.bundle_check import check_bundle
from coalesce.clusters import WASTE_BOUND
from coalesce.costs import Costs
from coalesce.errors import IRError, PassError, PlanError
from coalesce.kernels import choose
from coalesce.passes.align import align
from coalesce.passes.chain_products import chain_products
from coalesce.passes.choose_kernels import Choice, choose_kernels
from coalesce.passes.cluster import cluster
from coalesce.passes.cut_executables import cut_executables
from coalesce.passes.form_packs import form_packs
from coalesce.passes.fuse_attention import fuse_attention
from coalesce.passes.fuse_epilogues import fuse_epilogues
from coalesce.passes.fuse_rows import fuse_rows
from coalesce.passes.join_arrays import join_arrays
from coalesce.passes.keep_layouts import Held, keep_layouts
from coalesce.passes.pack import pack
from coalesce.passes.part_families import part_families
from coalesce.passes.pipeline import name_of
from coalesce.passes.plan_layouts import plan_layouts
from coalesce.passes.round_results import round_results
from coalesce.passes.run_in_shifts import run_in_shifts
from coalesce.passes.share_launches import share_launches
from coalesce.passes.side_by_side import side_by_side
from coalesce.passes.unroll_loops import unroll_loops
from coalesce.tuning import Tuned, UNTUNED
from coalesce.weigh import can_launch, no_launch

BundlePass = Callable[[Bundle], Bundle]

POLICIES = ("auto", "always", "never")
# What bundles compute right without, too; what is across families goes by the policy, and cuts by `executables`.
OPTIONAL = (
    "unroll_loops",
    "share_launches",
    "fuse_attention",
    "fuse_epilogues",
    "chain_products",
    "round_results",
    "fuse_rows",
    "run_in_shifts",
    "join_arrays",
    "side_by_side",
)


def bundle_passes(
    *,
    platform: str,
    costs: Costs,
    policy: str = "auto",
    waste_bound: float = WASTE_BOUND,
    choice: Choice = choose,
    launches: bool = False,
    tuned: Tuned = UNTUNED,
    within_program: bool = False,
    pack_unbounded_loops: bool = False,
    executables: int | None = None,
    beside: bool | None = None,
    captured: bool = False,
    unroll: bool = True,
) -> tuple[BundlePass, ...]:
    # families as wide lanes: every equation in order, a pack for each heavy op of a family
    first = (partial(form_packs, within_program=within_program, pack_unbounded_loops=pack_unbounded_loops),)
    by_gain = launches and policy == "auto" and platform != "cpu"
    may_launch = partial(can_launch, choice=choice, platform=platform, tuned=tuned) if by_gain else no_launch
    if executables is not None and executables > 1:
        beside = False  # they run in turns
    apart = (partial(part_families, platform=platform, costs=costs, wanted=beside, captured=captured),)
    across = (
        partial(cluster, waste_bound=waste_bound),  # which packs are near enough in shape
        # which of those run as one
        partial(align, costs=costs, policy=policy, waste_bound=waste_bound, may_launch=may_launch),
        *(apart if policy == "auto" else ()),  # and which of these better run side by side
        pack,  # one order for all families, in which they do
    )
    loops = (partial(unroll_loops, costs=costs),)  # which are none: once it is known what runs in one
    kernels = (partial(choose_kernels, platform=platform, choice=choice, tuned=tuned),)  # what runs each pack
    # packs that run better in one kernel than each in its own
    sharing = {"policy": policy, "within_program": within_program, "may_launch": may_launch}
    share = (partial(share_launches, costs=costs, tuned=tuned, **sharing),)
    last = (
        # products that need not write what the next one reads
        partial(fuse_attention, platform=platform, choice=choice, tuned=tuned),
        # what these do to their results: after the kernels, not all of which can
        partial(fuse_epilogues, choice=choice, tuned=tuned),
        partial(chain_products, tuned=tuned),  # which of them run as one, tile by tile: with what they do by then
        partial(round_results, costs=costs, tuned=tuned, choice=choice),  # and for whom: what is left is known by then
        partial(fuse_rows, platform=platform),  # what lies between them, and what is rounded there
        # which loops run for some lanes after others: as kernels read weights
        partial(run_in_shifts, costs=costs, unroll=unroll),
        plan_layouts,  # where the weights lie: after the kernels, which say how they read them
        partial(join_arrays, platform=platform),  # which of these arrays are one argument
        # whether families run in turns: once nothing moves any more
        partial(side_by_side, platform=platform, costs=costs, wanted=beside),
        # where a program is launched in parts: not where they run at once
        partial(cut_executables, platform=platform, costs=costs, executables=executables),
    )
    if policy == "never":
        return first + loops + kernels + last
    return first + across + loops + kernels + (share if launches else ()) + last


def serving_passes(
    *,
    held: Sequence[Held],
    platform: str,
    costs: Costs,
    choice: Choice = choose,
    tuned: Tuned = UNTUNED,
    pack_unbounded_loops: bool = False,
    full: Sequence[Collection[int]] = (),
) -> tuple[BundlePass, ...]:
    """For programs whose lanes read a growing bank by slot: a weight has one layout, and shares an array with none.
    `held` and `full` as in `keep_layouts`."""
    return (
        partial(form_packs, pack_unbounded_loops=pack_unbounded_loops),
        partial(unroll_loops, costs=costs),
        partial(keep_layouts, held=held, platform=platform, costs=costs, choice=choice, tuned=tuned, full=full),
        # of several families: what reads the bank in place runs side by side, as it is
        partial(share_launches, costs=costs, tuned=tuned),
        partial(fuse_attention, platform=platform, choice=choice, tuned=tuned),
        partial(fuse_epilogues, choice=choice, tuned=tuned),
        partial(chain_products, tuned=tuned),
        partial(round_results, costs=costs, tuned=tuned, choice=choice),
        partial(fuse_rows, platform=platform),
        partial(run_in_shifts, costs=costs),
        plan_layouts,
    )


@dataclass(frozen=True)
class BundleStep:
    name: str
    bundle: Bundle
    seconds: float


def plan(bundle: Bundle, without: Collection[str] = (), **options) -> tuple[BundleStep, ...]:
    """Run the bundle passes but for those `without`: see `run_passes`."""
    if "side_by_side" in without:
        options["beside"] = False  # nothing is taken apart for it
    if "unroll_loops" in without:
        options["unroll"] = False
    return run_passes(bundle, [run for run in bundle_passes(**options) if name_of(run) not in without])


def run_passes(bundle: Bundle, passes: Sequence[BundlePass]) -> tuple[BundleStep, ...]:
    """Run passes over a bundle, checking the schedule after each that changed something.

    Raises:
      PassError: a pass raised, or handed on a schedule that is not a topological order of every equation.
      PlanError: an option does not fit the programs.
    """
    steps: list[BundleStep] = []
    for run in passes:
        name = name_of(run)
        start = perf_counter()
        try:
            before, bundle = bundle, run(bundle)
            seconds = perf_counter() - start
            if bundle is not before or not steps:
                check_bundle(bundle)
        except PlanError:
            raise
        except Exception as e:
            kind = "handed on a broken bundle" if isinstance(e, IRError) else "failed"
            earlier = ", ".join(step.name for step in steps) or "none"
            raise PassError(f"{name} {kind} (ran before: {earlier}): {type(e).__name__}: {e}") from e
        steps.append(BundleStep(name, bundle, seconds))
    return tuple(steps)
