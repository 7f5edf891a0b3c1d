"""The simulator, by hand: what it tells a policy and when, and what it makes of the answers."""

from collections.abc import Sequence
from itertools import count
from random import Random

import pytest

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command, Dispatch, Reason, Reject, WakeAt, Want
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
from coalesce.scheduler.machine import Compiler, Host, Line, line_catalog, line_times, quantiles, SerialHost
from coalesce.scheduler.policy import Policy
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.run import Outcome, quantile, Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival

pytestmark = pytest.mark.once

TENANTS = [Tenant("a", (0,), 100), Tenant("b", (0,), 100)]
CATALOG = Catalog((Executable(0, (Entry(0, 0, 2),), 10, 10), Executable(1, (Entry(0, 0, 1),), 10, 10)))


class OneByOne:
    """Runs each request by itself as soon as it comes; `answers` replaces what it says to the n-th event."""

    def __init__(self, answers: dict[int, list[Command]] | None = None) -> None:
        self.told: list[tuple[int, Event]] = []
        self.answers = answers or {}
        self.bundles = count()

    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        self.told.append((now_ns, event))
        if (n := len(self.told) - 1) in self.answers:
            return self.answers[n]
        if not isinstance(event, Submitted):
            return ()
        return [Dispatch(next(self.bundles), 1, ((r.id,),), 10, 10) for r in event.requests]


def run_of(policy: Policy, *arrivals: tuple[int, str], **options) -> Run:
    return simulate(policy, TENANTS, CATALOG, [Arrival(*a) for a in arrivals], **options)


def test_the_policy_is_told_everything_in_order():
    policy = OneByOne()
    run = run_of(policy, (5, "a"), (5, "b"), (7, "a"), happenings=[(6, Cancelled(1)), (50, Closed(True))])
    assert [(at, type(event)) for at, event in policy.told] == [
        (0, CatalogChanged),
        (0, TenantAdded),
        (0, TenantAdded),
        (5, Submitted),
        (6, Cancelled),
        (7, Submitted),
        (15, Completed),
        (25, Completed),
        (35, Completed),
        (50, Closed),
    ]
    assert [(e.start_ns, e.end_ns) for _, e in policy.told if isinstance(e, Completed)] == [(5, 15), (15, 25), (25, 35)]
    assert run.outcomes == [Outcome.OK, Outcome.CANCELLED, Outcome.OK]
    assert run.ends_ns == [15, 25, 35]
    assert (run.busy_ns, run.bundles, run.lanes, run.widths, run.end_ns) == (30, 3, 3, 3, 50)


def test_what_comes_late_is_late_and_what_never_ends_is_pending():
    run = run_of(OneByOne(), *[(0, "a")] * 12, until_ns=115)
    assert run.counts() == {Outcome.OK: 10, Outcome.LATE: 1, Outcome.PENDING: 1}
    assert run.attainment() == 10 / 12 and run.latencies_ns()[-1] == 110
    assert quantile(run.latencies_ns(), 0.5) == 60


def test_the_host_takes_time_too():
    policy = OneByOne()
    host = Host(decide_ns=4, dispatch_ns=2, tell_ns=3)
    run = run_of(policy, (20, "a"), (21, "b"), (22, "b"), host=host)
    submitted = [(at, len(event.requests)) for at, event in policy.told if isinstance(event, Submitted)]
    assert submitted == [(20, 1), (24, 2)]  # what came while it decided is told together
    assert run.ends_ns == [35, 45, 55]  # begun at 22, 32 and 42
    assert run.busy_ns == 30


def test_one_thread_decides_and_brings_and_another_hands_out():
    policy = OneByOne()
    host = SerialHost(
        Random(0), request_ns=2, event_ns=1, bundle_ns=5, lane_ns=1, results_ns=20, result_ns=1, wake_ns=3
    )
    run = run_of(policy, (100, "a"), (104, "b"), (105, "b"), host=host)
    (told, *later), ended = policy.told[3:], [e for _, e in policy.told if isinstance(e, Completed)]
    assert told[0] == 103  # it had to wake up; then it was busy until 106, and with the bundle until 112
    assert [(at, type(event)) for at, event in later[:1]] == [(112, Submitted)]  # told together
    first, second, third = ended
    assert (first.start_ns, first.end_ns, first.host_ns, first.results_ns) == (106, 122, 6, 0)
    assert second.results_ns == third.results_ns == 21 and second.end_ns >= first.end_ns + 21
    assert run.ends_ns == [own.end_ns + 21 for own in ended]


def test_who_came_before_a_bundle_ended_is_told_after_it():
    policy = OneByOne()
    run_of(policy, (0, "a"), (16, "b"), host=Host(decide_ns=1, wake_ns=5))
    (_, ended), (_, came) = [own for own in policy.told if isinstance(own[1], Completed | Submitted)][1:3]
    assert isinstance(ended, Completed) and ended.followed and isinstance(came, Submitted)


def test_timers_come_when_they_were_asked_for_and_any_event_asks_anew():
    policy = OneByOne({2: [WakeAt(10)], 3: [WakeAt(40)], 4: [WakeAt(60)]})
    run_of(policy, (20, "a"))
    assert [(at, type(event)) for at, event in policy.told[3:]] == [(10, Timer), (20, Submitted), (60, Timer)]


def test_refused_is_at_submit_and_dropped_is_later():
    policy = OneByOne({3: [Reject(0, Reason.INFEASIBLE), WakeAt(9)], 4: [Reject(1, Reason.EXPIRED)]})
    run = run_of(policy, (5, "a"), (5, "a"))
    assert run.outcomes == [Outcome.REFUSED, Outcome.DROPPED]
    assert run.reasons == {0: Reason.INFEASIBLE, 1: Reason.EXPIRED}


def test_faults():
    slow = Faults(slow=(Slow(5.0, "b", 10, 100), Slow(2.0, None, 100)))
    run = run_of(OneByOne(), (0, "a"), (20, "b"), (200, "a"), faults=slow)
    assert run.ends_ns == [10, 70, 220]
    run = run_of(OneByOne(), (0, "a"), (50, "a"), faults=Faults(stalls=(Stall(5, 30),)))
    assert run.ends_ns == [30, 60]
    run = run_of(OneByOne(), (0, "a"), (20, "b"), faults=Faults(raising=(Raises("b"),)))
    assert run.failures == 1 and run.outcomes == [Outcome.OK, Outcome.PENDING]


def test_what_is_wanted_comes_after_a_while():
    wanted = (Entry(0, 0, 4),)
    policy = OneByOne({2: [Want(wanted), Want(wanted)]})
    run_of(policy, compiler=Compiler(lambda entries: (7, 8), takes_ns=50))
    (at, changed) = policy.told[-1]
    assert at == 50 and isinstance(changed, CatalogChanged)
    assert changed.catalog.executables == (*CATALOG.executables, Executable(2, wanted, 7, 8))


def test_tenants_come_and_go():
    later = Tenant("c", (0,), 50)
    run = simulate(
        Coalescing(),
        TENANTS,
        CATALOG,
        [Arrival(0, "a"), Arrival(20, "c"), Arrival(60, "c")],
        happenings=[(10, TenantAdded(later)), (55, TenantRemoved("c", drain=True))],
    )
    assert run.outcomes == [Outcome.OK, Outcome.OK, Outcome.REFUSED]
    assert run.reasons == {2: Reason.TENANT_CLOSED} or run.reasons == {2: Reason.UNKNOWN_TENANT}


def test_equal_seeds_give_equal_logs_and_others_do_not():
    catalog = line_catalog({0: Line(50_000, 1_000_000)}, spread=1.5)
    arrivals = [Arrival(i * 100_000, "ab"[i % 2], 20_000_000) for i in range(300)]

    def log(seed: int):
        return simulate(Coalescing(), TENANTS, catalog, arrivals, seed=seed, keep_log=True).log

    assert log(1) == log(1) != log(2)
    assert len(log(1)) > 300


def test_times_are_drawn_as_the_quantiles_say():

    rng = Random(0)
    times = sorted(quantiles(Executable(0, (), 1000, 1500), rng) for _ in range(10_000))
    assert abs(times[5000] - 1000) < 10 and abs(times[9900] - 1500) < 40
    assert quantiles(Executable(0, (), 1000, 1000), rng) == 1000


def test_a_mixed_executable_of_lines_pays_the_fixed_part_once():
    lines = {0: Line(10, 100), 1: Line(20, 60)}
    catalog = line_catalog(lines, (1, 2), segments=3, mixed=[(Entry(0, 0, 2), Entry(1, 2, 1))])
    assert len(catalog.executables) == 13 and catalog.segments_of(1) == 3
    assert catalog.mixed[0].l50_ns == (2 * 10 + 20 + 100) // 3
    assert line_times(lines, [Entry(1, 0, 4)]) == (140, 140)
