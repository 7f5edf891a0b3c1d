"""The policy by hand: short stories whose times can be checked on paper.

A run of one family takes 1 ms and 1 ms a lane, so 2, 3, 5 and 9 ms for 1, 2, 4 and 8 lanes, unless a story says
otherwise. What is told and what is decided is printed a line each, in milliseconds.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest

from coalesce.scheduler.catalog import Catalog, Entry
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Dispatch, Reason, Reject, Want
from coalesce.scheduler.events import Cancelled, CatalogChanged, Completed, Submitted, TenantAdded
from coalesce.scheduler.machine import Line, line_catalog
from coalesce.scheduler.request import Request, Tenant
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival

pytestmark = pytest.mark.once
MS = 1_000_000
LINES = {family: Line(MS, MS) for family in range(2)}


def story(tenants: Sequence[Tenant], arrivals: Sequence[tuple[float, str]], what: Catalog, **options: Any) -> str:
    """Requests by number, with their tenants."""
    run = simulate(
        Coalescing(), tenants, what, [Arrival(round(at * MS), name) for at, name in arrivals], keep_log=True, **options
    )
    names = {e.id: " with ".join(f"{x.family}.{x.segment}x{x.width}" for x in e.entries) for e in what.executables}
    lines = []
    for event, now_ns, commands in run.log:
        if isinstance(event, Completed):
            lines.append(f"{now_ns / MS:6.2f}  bundle {event.bundle} is done")
        for c in commands:
            if isinstance(c, Dispatch):
                lanes = " | ".join(" ".join(f"{i}{run.requests[i].tenant}" for i in own) for own in c.lanes)
                lines.append(f"{now_ns / MS:6.2f}  dispatch {c.bundle} in {names[c.executable]}: {lanes}  ({c.why})")
            elif isinstance(c, Reject):
                lines.append(f"{now_ns / MS:6.2f}  reject {c.request}{run.requests[c.request].tenant}: {c.reason.name}")
            elif isinstance(c, Want):
                wanted = " with ".join(f"{x.family}.{x.segment}x{x.width}" for x in c.entries)
                lines.append(f"{now_ns / MS:6.2f}  want {wanted}")
    outcomes = " ".join(
        f"{i}{r.tenant}:{o.value}" for i, (r, o) in enumerate(zip(run.requests, run.outcomes, strict=True))
    )
    return "\n".join([*lines, outcomes])


Golden = Callable[[object], None]


def tenant(name: str, slo_ms: float, family: int = 0, priority: int = 0) -> Tenant:
    return Tenant(name, (family,), round(slo_ms * MS), priority)


def test_what_waits_shares_the_next_run(golden: Golden):
    golden(story([tenant("a", 50)], [(0, "a"), *[(0.5, "a")] * 4], line_catalog(LINES, (1, 2, 4))))


def test_the_most_urgent_goes_first(golden: Golden):
    both = [tenant("a", 60), tenant("b", 12, family=1)]
    golden(story(both, [(0, "a"), (0.5, "a"), (1, "b")], line_catalog(LINES, (1, 2, 4))))


def test_an_idle_device_waits_for_company_that_comes_often(golden: Golden):
    """Eight come every 30 ms, and 8 ms of a run are fixed: the first waits for the others, once that is known."""
    arrivals = [(30 * i + 0.1 * j, "a") for i in range(3) for j in range(8)]
    golden(story([tenant("a", 80)], arrivals, line_catalog({0: Line(MS, 8 * MS)}, (1, 2, 4, 8))))


def test_no_run_is_longer_than_the_most_urgent_tenant_can_wait(golden: Golden):
    """b can wait 6 - 2 ms: so a's lanes go by two, though eight would take less time each."""
    both = [tenant("a", 100), tenant("b", 6)]
    golden(story(both, [(0, "a")] * 9, line_catalog(LINES, (1, 2, 4, 8))))


def test_who_cannot_be_in_time_is_refused_at_once(golden: Golden):
    golden(story([tenant("a", 11)], [(0, "a")] * 12, line_catalog(LINES, (1, 2, 4))))


def test_late_arrivals_catch_up(golden: Golden):
    """In three segments: one that comes while the other is in its first segment runs that, and then both go on."""
    golden(story([tenant("a", 60)], [(0, "a"), (0.3, "a")], line_catalog(LINES, (1, 2), segments=3)))


def test_two_families_share_a_mixed_executable(golden: Golden):
    both = [tenant("a", 50), tenant("b", 50, family=1)]
    what = line_catalog(LINES, (1, 2), mixed=[(Entry(0, 0, 1), Entry(1, 0, 1))])
    golden(story(both, [(0, "a"), (1, "a"), (1, "b")], what))


def test_a_mixed_executable_is_wanted_once_two_families_keep_waiting_for_each_other(golden: Golden):
    both = [tenant("a", 50), tenant("b", 50, family=1)]
    arrivals = [(6 * i + at, name) for i in range(20) for at, name in ((0, "a"), (0.1, "a"), (0.2, "b"))]
    text = story(both, arrivals, line_catalog(LINES, (1, 2)))
    wanted = [line for line in text.splitlines() if "want" in line]
    assert wanted
    golden(wanted[0])


def test_lanes_to_spare_are_filled_with_lower_priorities(golden: Golden):
    both = [tenant("h", 50, priority=1), tenant("l", 50)]
    golden(story(both, [(0, "h"), (0.5, "l"), (0.5, "h"), (0.6, "h"), (0.7, "h")], line_catalog(LINES, (1, 4))))


@pytest.mark.inside
def test_a_copy_of_a_policy_goes_its_own_way():
    policy = Coalescing()
    for event in CatalogChanged(Catalog()), TenantAdded(tenant("a", 50)):
        policy.on_event(event, 0)
    policy.on_event(Submitted(tuple(Request(i, "a", 0, 0, 50 * MS) for i in range(2))), 0)  # nothing can run it yet
    other = deepcopy(policy)
    assert other.on_event(Cancelled(0), MS)[0] == Reject(0, Reason.CANCELLED) and other.waiting == 1
    assert policy.waiting == 2
    offered = CatalogChanged(line_catalog(LINES, (1, 2)))
    first, second = (
        [c.lanes for c in own.on_event(offered, 2 * MS) if isinstance(c, Dispatch)] for own in (policy, other)
    )
    assert first == [((0, 1),)] and second == [((1,),)]
