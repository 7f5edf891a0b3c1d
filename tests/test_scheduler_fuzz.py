"""Whatever happens, what is always true stays true: random tenants, programs, loads, faults, cancellations, changes.

Every seed is a simulation of its own. A seed that fails says so, and `simulated(seed)` runs it again.
"""

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, RuleBasedStateMachine

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Dispatch, WakeAt
from coalesce.scheduler.events import (
    Cancelled,
    CatalogChanged,
    Closed,
    Completed,
    Event,
    Submitted,
    TenantAdded,
    TenantRemoved,
    Timer,
)
from coalesce.scheduler.faults import Faults, Raises, Slow, Stall
from coalesce.scheduler.invariants import Checker
from coalesce.scheduler.machine import Compiler, Host, Line, line_catalog, line_times
from coalesce.scheduler.replay import replay
from coalesce.scheduler.request import Request, Tenant
from coalesce.scheduler.run import Outcome, Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival, arrive, gamma
from tests.simulated import MS

pytestmark = pytest.mark.once


def simulated(seed: int) -> Run:
    rng = Random(seed)
    families, segments = rng.randint(1, 4), rng.choice([1, 1, 2, 3])
    lines = {f: Line(rng.randrange(10_000, 200_000), rng.randrange(100_000, 2 * MS)) for f in range(families)}
    widths = [1 << i for i in range(rng.randint(1, 6))]
    mixed = []
    if families > 1 and rng.random() < 0.5:
        mixed = [(Entry(0, rng.randrange(segments), widths[-1]), Entry(1, rng.randrange(segments), widths[-1]))]
    catalog = line_catalog(
        lines,
        widths,
        segments=segments,
        spread=rng.choice([1.0, 1.2, 2.0, 5.0]),
        mixed=mixed,
        slots=rng.choice([None, widths[-1], 4 * widths[-1]]),
    )
    names = [f"t{i}" for i in range(rng.randint(1, 12))]
    tenants = [
        Tenant(
            name,
            tuple(rng.sample(range(families), rng.randint(1, families))),
            rng.randrange(2 * MS, 60 * MS),
            rng.choice([0, 0, 0, 1, -1]),
            rng.choice([1.0, 1.0, 4.0]),
            rng.choice([1, 8, 1024]),
        )
        for name in names
    ]
    end_ns = rng.randrange(5 * MS, 100 * MS)
    times = gamma(rng, rng.choice([200.0, 2000.0, 10_000.0]), rng.choice([0.3, 1.0, 4.0]))
    by_name = {tenant.name: tenant for tenant in tenants}
    arrivals = [dressed(rng, arrival, by_name[arrival.tenant]) for arrival in arrive(rng, times, names, end_ns)]
    return simulate(
        Coalescing(),
        tenants,
        catalog,
        arrivals,
        happenings=happenings(rng, arrivals, tenants, catalog, end_ns),
        host=Host(rng.choice([0, 20_000]), rng.choice([0, 50_000]), rng.choice([0, 100_000])),
        faults=faults(rng, names, end_ns),
        compiler=rng.choice([None, Compiler(lambda entries: line_times(lines, entries, segments), 5 * MS)]),
        seed=seed,
        keep_log=True,
    )


def dressed(rng: Random, arrival: Arrival, tenant: Tenant) -> Arrival:
    """With a deadline, a priority and a request shape of its own, now and then."""
    allowed = rng.choice([None, None, None, 0, rng.randrange(100 * MS)])
    return Arrival(arrival.time_ns, tenant.name, allowed, rng.choice([0, 0, 0, 2]), rng.choice(tenant.families))


def happenings(
    rng: Random, arrivals: list[Arrival], tenants: list[Tenant], catalog: Catalog, end_ns: int
) -> list[tuple[int, Event]]:
    found: list[tuple[int, Event]] = []
    share = rng.choice([0.0, 0.1, 0.8])
    for number, arrival in enumerate(arrivals):
        while rng.random() < share:
            found.append((arrival.time_ns + rng.randrange(10 * MS), Cancelled(number)))
    for _ in range(rng.choice([0, 0, 5])):
        tenant, at = rng.choice(tenants), rng.randrange(end_ns)
        found.append((at, TenantRemoved(tenant.name, drain=rng.random() < 0.5)))
        found.append((at + rng.randrange(5 * MS), TenantAdded(tenant)))
    if rng.random() < 0.3:  # some executables go and come again
        fewer = Catalog(tuple(e for e in catalog.executables if rng.random() < 0.7), catalog.segments, catalog.slots)
        found += [(end_ns // 3, CatalogChanged(fewer)), (end_ns // 2, CatalogChanged(catalog))]
    if rng.random() < 0.3:
        found.append((rng.randrange(end_ns), Closed(drain=rng.random() < 0.5)))
    return sorted(found, key=lambda pair: pair[0])


def faults(rng: Random, names: list[str], end_ns: int) -> Faults:
    def span() -> tuple[int, int]:
        begin = rng.randrange(end_ns)
        return begin, begin + rng.randrange(1, 50 * MS)

    return Faults(
        tuple(
            Slow(rng.choice([0.5, 1.5, 5.0]), rng.choice([None, *names]), *span()) for _ in range(rng.choice([0, 0, 2]))
        ),
        tuple(Raises(rng.choice(names), rng.choice([0.1, 1.0]), *span()) for _ in range(rng.choice([0, 0, 1, 3]))),
        tuple(Stall(*span()) for _ in range(rng.choice([0, 0, 1]))),
    )


def ended(outcomes: Counter[Outcome]) -> Counter[str]:
    """By kinds that the log tells apart as the clients do, who know a little later than the bundle ends."""
    return Counter("result" if o in (Outcome.OK, Outcome.LATE) else o.value for o in outcomes.elements())


def check(seed: int) -> None:
    run = simulated(seed)
    checker = Checker(depth=2, patience_ns=4 * MS)
    for decision in run.log:
        checker.see(*decision)
    violations = checker.finish()
    assert violations[:3] == [], f"seed {seed}"
    assert ended(checker.outcomes) == ended(run.counts()), f"seed {seed}"
    assert replay(run.log, Coalescing()) is None, f"seed {seed}"


@pytest.mark.parametrize("tenth", range(10))
def test_what_is_always_true(tenth):
    for seed in range(10 * tenth, 10 * tenth + 10):
        check(seed)


@pytest.mark.soak
@pytest.mark.parametrize("hundred", range(25))
def test_what_is_always_true_of_thousands(hundred):
    for seed in range(1000 + 100 * hundred, 1100 + 100 * hundred):
        check(seed)


class Served(RuleBasedStateMachine):
    """Tenants come and go, requests come and are cancelled, bundles end or fail, in any order at any time."""

    @initialize(segments=st.integers(1, 3), slots=st.sampled_from([None, 4]))
    def begin(self, segments: int, slots: int | None) -> None:
        self.policy, self.checker = Coalescing(), Checker(depth=2, patience_ns=4 * MS)
        self.now_ns, self.requests, self.wake_ns = 0, 0, None
        self.flying: list[Dispatch] = []
        self.free_ns = 0
        self.tenants: set[str] = set()
        made = [
            Executable(s * 3 + i, (Entry(0, s, width),), MS, MS)
            for s in range(segments)
            for i, width in enumerate((1, 2, 4))
        ]
        self.tell(CatalogChanged(Catalog(tuple(made), {0: segments}, None if slots is None else {0: slots})))

    def tell(self, event: Event) -> None:
        commands = self.policy.on_event(event, self.now_ns)
        self.checker.see(event, self.now_ns, commands)
        self.flying += [c for c in commands if isinstance(c, Dispatch)]
        self.wake_ns = next((c.time_ns for c in commands if isinstance(c, WakeAt)), None)

    @rule(
        name=st.sampled_from("abc"),
        slo_ms=st.integers(2, 50),
        quota=st.sampled_from([1, 100]),
        priority=st.integers(0, 1),
    )
    def add(self, name: str, slo_ms: int, quota: int, priority: int) -> None:
        self.tell(TenantAdded(Tenant(name, (0,), slo_ms * MS, priority, 1.0, quota)))

    @rule(name=st.sampled_from("abc"), drain=st.booleans())
    def remove(self, name: str, drain: bool) -> None:
        self.tell(TenantRemoved(name, drain))

    @rule(names=st.lists(st.sampled_from("abcd"), min_size=1, max_size=6), allowed_ms=st.integers(-1, 60))
    def submit(self, names: list[str], allowed_ms: int) -> None:
        first = self.requests
        self.requests += len(names)
        at, deadline = self.now_ns, self.now_ns + allowed_ms * MS
        self.tell(Submitted(tuple(Request(first + i, name, 0, at, deadline) for i, name in enumerate(names))))

    @rule(back=st.integers(1, 12))
    def cancel(self, back: int) -> None:
        self.tell(Cancelled(max(0, self.requests - back)))

    @precondition(lambda self: self.flying)
    @rule(took_us=st.integers(1, 9000), failed=st.booleans())
    def complete(self, took_us: int, failed: bool) -> None:
        self.end_bundle(took_us * 1000, failed)

    def end_bundle(self, took_ns: int, failed: bool) -> None:
        bundle = self.flying.pop(0)
        start_ns = max(self.now_ns, self.free_ns)
        self.now_ns = self.free_ns = start_ns + took_ns
        self.tell(Completed(bundle.bundle, start_ns, self.free_ns, failed))

    @rule(us=st.integers(0, 3000))
    def wait(self, us: int) -> None:
        """Until then, or until the policy wants to be woken."""
        until_ns = self.now_ns + us * 1000
        woken = self.wake_ns is not None and self.wake_ns <= until_ns
        self.now_ns = self.wake_ns if woken and self.wake_ns is not None else until_ns
        if woken:
            self.tell(Timer())

    @rule(drain=st.booleans())
    def close(self, drain: bool) -> None:
        self.tell(Closed(drain))

    @invariant()
    def nothing_is_violated(self) -> None:
        if hasattr(self, "checker"):
            assert self.checker.violations == []
            here = self.policy._tenancy.accounts.keys()
            assert self.policy._watch.standings.keys() <= here and self.policy._watch._failures.keys() <= here

    def teardown(self) -> None:
        """Everything ends once nothing more comes."""
        if not hasattr(self, "checker"):
            return
        self.tell(Closed(drain=True))
        for _ in range(100 + 20 * self.requests):
            if self.flying:
                self.end_bundle(MS, failed=False)
            elif self.wake_ns is not None:
                self.now_ns = max(self.now_ns, self.wake_ns)
                self.tell(Timer())
        assert self.checker.finish() == [] and self.policy.waiting == 0


class TestServed(Served.TestCase):
    settings: Any = settings(max_examples=60, stateful_step_count=40, deadline=None)
