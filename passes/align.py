"""Choose which packs and loops of different families run together, so that the whole bundle wins most.

Before                                            After
    pack 0 x1 dot M=1 N=8 K=4 [family 0 at 0]         ..., and: family 0 at 0 with family 1 at 0, padded
    pack 1 x1 dot M=1 N=7 K=4 [family 1 at 0]

Families are wide lanes: one pack of a family moves as a whole. Within a scope (the top level, or the bodies of scans
that run together) the packs, and the scans, are the nodes of a packing problem (coalesce.packing); dependencies between
them go through everything else. Scans are worth what their bodies win in all steps, which is the same problem one level
down. With policy "auto" a pack is worth the microseconds that it is predicted to win beyond the cost model's margin,
with "always" whatever is legal is worth the same. Packs that `may_launch`, with others of any shapes as they are,
stay apart for it (passes/share_launches.py), but for those in scans, which run as one only for what their bodies win.
Gives: no two places of one `bundle.aligned` depend on each other, and none of them waits for itself. The order of the
schedule does not change here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coalesce import jaxpr as J
from coalesce.behaviour import may_speculate
from coalesce.bundle import Aligned, Bundle, equations, Item, Loop, Pack, packs, Place, place_of, problems
from coalesce.clusters import canonical_gemm, Gemm, neighbourhoods, WASTE_BOUND
from coalesce.costs import Costs
from coalesce.packing import align as solve, Node, Problem
from coalesce.packing.problem import arrives_stacked, value
from coalesce.passes.stacks import Name
from coalesce.passes.unroll_loops import pays as unrolls
from coalesce.passes.why_alone import records_of
from coalesce.weigh import MayLaunch, no_launch, weigh, Weighed

Nodes = tuple[int, ...]

STACKED = 0.1  # with "always": what operands that arrive stacked are worth, in packed ops
WASTE = 0.01  # and what padding costs
PREDICTED = "predicted"  # no policy: what the cost model says, without its margin


def align(
    bundle: Bundle,
    *,
    costs: Costs,
    policy: str = "auto",
    waste_bound: float = WASTE_BOUND,
    may_launch: MayLaunch = no_launch,
) -> Bundle:
    """Choose by `policy`: "auto" what wins by `costs`, "always" all that is legal within the waste bound."""
    if bundle.records or len(bundle.families) < 2:
        return bundle
    weights = Weights(bundle, costs, policy, waste_bound, may_launch)
    chosen = solved(weights, bundle.schedule)
    reasons = weights.of, weights.margin, weights.for_launch, waste_bound
    records = records_of(bundle, chosen.aligned, weights.near, *reasons)
    if not records:
        return bundle
    return replace(bundle, aligned=chosen.aligned, predicted_us=chosen.predicted_us, records=records)


class Weights:
    """What packs and scans of a bundle are worth together; each pack is weighed once."""

    def __init__(
        self,
        bundle: Bundle,
        costs: Costs,
        policy: str,
        waste_bound: float,
        may_launch: MayLaunch,
    ) -> None:
        self.bundle, self.costs, self.policy, self.waste_bound = bundle, costs, policy, waste_bound
        self.may_launch = may_launch
        self.near = neighbourhood_of(bundle, waste_bound)
        self.margin = costs.margin if policy == "auto" else 0.0
        self.known: dict[tuple[int, ...], Weighed | None] = {}

    def of(self, parts: Sequence[Pack]) -> Weighed | None:
        key = tuple(part.index for part in parts)
        if key not in self.known:
            self.known[key] = weigh(parts, self.bundle.families, self.costs, self.waste_bound)
        return self.known[key]

    def gain(self, parts: Sequence[Pack], policy: str) -> float | None:
        weighed = self.of(parts)
        if weighed is None or all(map(self.for_launch, parts)):
            return None
        if policy == "always":
            return len(parts) - 1 - WASTE * weighed.waste
        return weighed.gain_us - (0.0 if policy == PREDICTED else self.margin * weighed.parts_us)

    def for_launch(self, part: Pack) -> bool:
        """Whether a pack is left to share a launch."""
        return "." not in place_of(part)[1] and self.may_launch(part, self.bundle.families)

    def bonus(self, parts: Sequence[Pack], policy: str) -> float:
        weighed = self.of(parts)
        if weighed is None or weighed.shared.form == "product":
            return 0.0
        return STACKED * (len(parts) - 1) if policy == "always" else weighed.stacked_us

    def steps_us(self, loops: Sequence[Loop], won: float) -> float:
        """What scans win by running together, from what their bodies win in one step."""
        lengths, families = [J.as_scan(loop.eqn).length for loop in loops], self.bundle.families
        # The longest decides how often everything runs: a shorter one works on, and what it does is thrown away.
        step_us = [sum(self.costs.op(p.op, *problems(p, families)) for p in packs(loop.bodies[0])) for loop in loops]
        wasted = sum((max(lengths) - length) * us for length, us in zip(lengths, step_us, strict=True))
        waited = max(lengths) * self.costs.loop_wait * sum(step_us)
        return max(lengths) * won - wasted - waited + self.iterations(loops) * self.costs.loop

    def overlap(self, loops: Sequence[Loop]) -> bool:
        """Whether scans are better apart, whatever their bodies share: those that are no loops, since nothing keeps
        their chains of kernels from running side by side. As one, an LSTM and a GRU took 10% longer on an H200, where
        their superkernels were predicted to win 18%."""
        return all(unrolls([loop], self.bundle, self.costs) for loop in loops)

    def iterations(self, loops: Sequence[Loop]) -> int:
        """How many iterations scans save by running as one. What is unrolled has none, alone or together."""

        def of(parts: Sequence[Loop]) -> int:
            longest = max(J.as_scan(part.eqn).length for part in parts)
            return 0 if unrolls(parts, self.bundle, self.costs) else longest

        return sum(of([loop]) for loop in loops) - of(loops)


def neighbourhood_of(bundle: Bundle, waste_bound: float) -> dict[Place, int]:
    """Packs that might share a superkernel have one number."""
    places: list[Place] = []
    seen_as: list[tuple[Gemm, Gemm]] = []
    for part in packs(bundle.schedule):
        gemm, (_, lanes) = canonical_gemm(part.op), problems(part, bundle.families)
        places.append(place_of(part))
        seen_as.append((gemm, replace(gemm, m=gemm.m * lanes)))  # a plain product takes lanes as its rows
    return dict(zip(places, neighbourhoods(seen_as, waste_bound), strict=True))


@dataclass(frozen=True)
class Solved:
    aligned: tuple[Aligned, ...]  # of the scope, and of the bodies of scans that it runs together
    value: float  # by the policy
    predicted_us: float  # by the cost model


def solved(weights: Weights, scope: Sequence[Item], carried: Mapping[Name, Name] = {}) -> Solved:  # noqa: B006
    """The packs and scans of one scope that are to run together; `carried` says what a step hands on to the next."""
    return Solver(weights, Dependencies(scope, carried)).solve()


def carries(loops: Sequence[Loop]) -> dict[Name, Name]:
    """For each carry of scans, as it comes into a body: as what the body leaves it."""
    found: dict[Name, Name] = {}
    for loop in loops:
        scan = J.as_scan(loop.eqn)
        into = J.invars(scan.body)[len(scan.consts) :]
        for var, out in zip(into, J.outvars(scan.body)[: len(scan.init)], strict=False):
            if not isinstance(out, J.Literal):
                found[loop.family, var] = loop.family, out
    return found


class Solver:
    """One scope's packing problem."""

    def __init__(self, weights: Weights, graph: Dependencies) -> None:
        self.weights, self.graph = weights, graph
        self.inner: dict[Nodes, Solved] = {}

    def solve(self) -> Solved:
        graph, weights = self.graph, self.weights
        nodes = tuple(
            Node(place_of(item)[0], kind(weights, item), feeders)
            for item, feeders in zip(graph.nodes, graph.feeders, strict=True)
        )
        problem = Problem(nodes, tuple(graph.before), *self.worth(weights.policy))
        packing = solve(problem)
        gain, bonus = self.worth(PREDICTED)
        predicted = value(replace(problem, gain=gain, bonus=bonus), packing.packs)
        aligned: list[Aligned] = []
        home = {node: chosen for chosen in packing.packs for node in chosen}
        for chosen in packing.packs:
            items = [graph.nodes[i] for i in chosen]
            places = tuple(sorted(map(place_of, items)))
            if isinstance(items[0], Pack):
                stacked = bonus(chosen) > 0 and arrives_stacked(problem, chosen, home)
                aligned.append(Aligned(places, self.weighed(chosen).shared.form, stacked))
            else:
                aligned += [Aligned(places, "scan"), *self.bodies(chosen).aligned]
        return Solved(tuple(sorted(aligned, key=lambda group: group.places)), packing.value, predicted)

    def worth(self, policy: str) -> tuple[Callable[[Nodes], float | None], Callable[[Nodes], float]]:
        """Gain and bonus of a packing problem."""

        def gain(nodes: Nodes) -> float | None:
            if self.are_packs(nodes):
                return self.weights.gain(self.items(nodes), policy)
            if why_apart(self.items(nodes)):
                return None
            found = self.bodies(nodes)
            if policy == "always":
                return found.value if found.aligned else None
            if policy == "auto" and self.weights.overlap(self.items(nodes)):
                return None
            if not found.aligned and self.weights.iterations(self.items(nodes)) <= 0:
                return None  # nothing would be won, and steps that wait for nobody's would wait for each other
            return self.weights.steps_us(self.items(nodes), found.predicted_us)

        def bonus(nodes: Nodes) -> float:
            slots = zip(*(self.graph.feeders[i] for i in nodes), strict=False)
            if not self.are_packs(nodes) or any(
                self.are_packs(slot) and not self.weights.bonus(self.items(slot), policy) for slot in slots
            ):
                return 0.0  # a scan, or after a plain product, which leaves nothing stacked
            return self.weights.bonus(self.items(nodes), policy)

        return gain, bonus

    def items(self, nodes: Sequence[int]) -> list[Any]:
        return [self.graph.nodes[i] for i in nodes]

    def are_packs(self, nodes: Sequence[int]) -> bool:
        return all(isinstance(self.graph.nodes[i], Pack) for i in nodes)

    def weighed(self, nodes: Nodes) -> Weighed:
        found = self.weights.of(self.items(nodes))
        assert found is not None, f"{nodes}: packed, and not legal"
        return found

    def bodies(self, nodes: Nodes) -> Solved:
        """What the bodies of scans win in one step."""
        if nodes not in self.inner:
            loops = self.items(nodes)
            scope = [item for loop in loops for item in loop.bodies[0]]
            self.inner[nodes] = solved(self.weights, scope, carries(loops))
        return self.inner[nodes]


def kind(weights: Weights, item: Item) -> Hashable:
    """Only items of one kind may run together."""
    if isinstance(item, Pack):
        return ("op", weights.near[place_of(item)])
    assert isinstance(item, Loop), f"{item} is no node"
    return ("scan",) if item.eqn.primitive.name == "scan" else place_of(item)


def why_apart(loops: Sequence[Loop]) -> str:
    """Why scans cannot run as one; empty if they can."""
    scans = [J.as_scan(loop.eqn) for loop in loops]
    if len({scan.reverse for scan in scans}) > 1:
        return "they run in opposite directions"
    if min(scan.length for scan in scans) == 0:
        return "one of them has no steps"
    if len({scan.length for scan in scans}) > 1 and any(
        loop.eqn.effects or not may_speculate(loop.eqn) for loop in loops
    ):
        return "the shorter one must not run on"
    return ""


class Dependencies:
    """The packs and loops of a scope, what each waits for, and where its operands come from: in a body, also from the
    step before."""

    def __init__(self, scope: Sequence[Item], carried: Mapping[Name, Name]) -> None:
        self.nodes: list[Item] = [item for item in scope if isinstance(item, Pack | Loop)]
        self.number = {id(item): i for i, item in enumerate(self.nodes)}
        waits = self.spread(scope, {})
        self.before = [tuple(sorted(waits.of(item))) for item in self.nodes]
        fed = self.spread(scope, {name: waits.at.get(left, ()) for name, left in carried.items()})
        self.feeders = [fed.of(item) for item in self.nodes]

    def spread(self, scope: Sequence[Item], given: Mapping[Name, Nodes]) -> Sources:
        sources = Sources(dict(given))
        for item in scope:
            own = self.number.get(id(item))
            leaves = sources.of(item) if own is None else (own,)
            sources.at.update(((f, v), leaves) for f, eqn in equations(item) for v in eqn.outvars)
        return sources


@dataclass
class Sources:
    """For each value, the nearest nodes that it comes from, in the order of operands."""

    at: dict[Name, Nodes]

    def of(self, item: Item) -> Nodes:
        read = [(f, a) for f, eqn in equations(item) for a in eqn.invars if not isinstance(a, J.Literal)]
        return tuple(dict.fromkeys(n for name in read for n in self.at.get(name, ())))
