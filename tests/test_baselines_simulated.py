"""The baseline policies in the simulator, with everything that can go wrong: what is always true, and equal seeds."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest

from coalesce.scheduler.events import Cancelled, CatalogChanged, Closed, Event, TenantAdded, TenantRemoved
from coalesce.scheduler.faults import Faults, Raises, Slow, Stall
from coalesce.scheduler.invariants import Checker
from coalesce.scheduler.machine import Compiler, Host, Line, line_catalog, line_times
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.run import Outcome, Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival
from tests.test_baselines import POLICIES

pytestmark = pytest.mark.once

MS = 1_000_000
END_NS = 200 * MS
PATIENCE_NS = {"symphony": 40 * MS, "packing deferred": 40 * MS}  # who waits for the latest moment; others do not wait


def a_world(seed: int, requests: int = 80) -> tuple[dict, list[Arrival]]:
    """Arguments of `simulate`: few tenants of few programs, and more than they can be served."""
    rng = Random(seed)
    lines = {family: Line(rng.randint(1, 5) * MS // 10, rng.randint(5, 20) * MS // 10) for family in range(3)}
    tenants = [
        Tenant(
            f"t{i}", (rng.randrange(3),), rng.randint(4, 40) * MS, rng.choice((0, 0, 1)), quota=rng.choice((3, 1000))
        )
        for i in range(6)
    ]
    segments = rng.choice((1, 3))
    spread = rng.choice((1.0, 1.3))
    slots = rng.choice((None, 3, 8))
    wide = line_catalog(lines, (1, 2, 4, 8), segments=segments, slots=slots, spread=spread)
    narrow = replace(wide, executables=tuple(e for e in wide.executables if e.entries[0].width <= 2))
    arrivals = sorted(
        Arrival(
            rng.randrange(END_NS), rng.choice(tenants).name, rng.choice((None, None, 1, 3 * MS)), rng.choice((0, 1))
        )
        for _ in range(requests)
    )
    cancelled = [(rng.randrange(END_NS), Cancelled(rng.randrange(requests))) for _ in range(requests // 5)]
    moves = [(rng.randrange(END_NS), CatalogChanged(rng.choice((wide, narrow)))) for _ in range(3)]
    leaver = rng.choice(tenants)
    gone_ns = rng.randrange(END_NS)
    goes: list[tuple[int, Event]] = [
        (gone_ns, TenantRemoved(leaver.name, rng.random() < 0.5)),
        (gone_ns + rng.randrange(50 * MS), TenantAdded(leaver)),
    ]
    end = [(END_NS - rng.randrange(20 * MS), Closed(rng.random() < 0.5))]
    world = {
        "tenants": tenants,
        "catalog": narrow,
        "happenings": [*cancelled, *moves, *goes, *end],
        "host": Host(*(rng.choice((0, 50_000)) for _ in range(3))),
        "faults": Faults(
            (Slow(5.0, tenants[0].name, 20 * MS, 60 * MS), Slow(1.5, None, 100 * MS, 120 * MS)),
            (Raises(tenants[1].name, rng.choice((0.0, 0.3, 1.0))),),
            (Stall(150 * MS, 160 * MS),),
        ),
        "compiler": Compiler(lambda entries: line_times(lines, entries, segments), 5 * MS),
        "seed": seed,
    }
    return world, arrivals


def runs_of(name: str, seed: int) -> Iterator[tuple[Run, Checker]]:
    world, arrivals = a_world(seed)
    for _ in range(2):
        checker = Checker(depth=2, patience_ns=PATIENCE_NS.get(name, MS))
        run = simulate(POLICIES[name](), arrivals=arrivals, keep_log=True, watchers=[checker.see], **world)
        yield run, checker


def check(name: str, seed: int) -> None:
    (run, checker), (again, _) = runs_of(name, seed)
    assert checker.finish() == [], f"{name}, seed {seed}"
    assert Outcome.PENDING not in run.counts() and len(run.requests) == run.counts().total()
    assert run.log == again.log


@pytest.mark.parametrize("name", list(POLICIES))
def test_what_is_always_true_holds(name):
    check(name, list(POLICIES).index(name))


@pytest.mark.soak
@pytest.mark.parametrize("name", list(POLICIES))
def test_what_is_always_true_holds_for_long(name):
    for seed in range(300):
        check(name, seed)
