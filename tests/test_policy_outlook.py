"""What is laid for a newcomer is what would be laid anew; which run is next; who is over its share by a burst."""

from __future__ import annotations

from random import Random
from statistics import fmean

import pytest
from hypothesis import given, strategies as st

from coalesce.scheduler import admission
from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Dispatch
from coalesce.scheduler.cover import Cover, Option
from coalesce.scheduler.lanes import Level
from coalesce.scheduler.laying import Newcomer, Outlook, Start
from coalesce.scheduler.machine import Host, Line, line_catalog
from coalesce.scheduler.outlook import Known, outlook, outlook_with
from coalesce.scheduler.promises import Promises
from coalesce.scheduler.rate import Rate
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.run import Outcome
from coalesce.scheduler.shares import Account, Shares
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival, arrive, gamma
from tests.simulated import checked, MS

pytestmark = pytest.mark.once

WINDOW_NS = 1 << 25  # of those in which bursts show


def said(ahead: Outlook) -> tuple[object, ...]:
    runs = [(due, serial, option, start) for due, serial, _, _, _, option, _, _, start, _, _ in ahead.turns]
    return ahead.late, ahead.tardy_ns, ahead.hurried, ahead.end_ns, ahead.slip_ns, runs


@pytest.mark.inside
@pytest.mark.parametrize(("seed", "share"), [*((seed, 0.0) for seed in range(6)), (0, 0.1), (3, 0.1), (5, 0.1)])
def test_a_newcomer_is_laid_as_if_all_were_laid_anew(seed, share, monkeypatch):
    """Also where too much is asked for, and a share of everybody's time is kept who may take no longer than 5 ms."""
    asked = kept = spared = 0

    def both_ways(before: Known, level: Level, start: Start, now_ns: int, new: Newcomer) -> Outlook:
        nonlocal asked, kept, spared
        found, anew = outlook_with(before, level, start, now_ns, new), outlook(level, start, now_ns, new)
        assert said(found) == said(anew)
        asked += 1
        kept += len(found.turns) > 1
        spared += start.spared > 0
        return found

    monkeypatch.setattr(admission, "outlook_with", both_ways)
    monkeypatch.setattr(Promises, "spared", lambda self, now_ns: (share, 5 * MS))
    rng = Random(seed)
    families, segments = 1 + seed % 3, 1 + 2 * (seed > 3)
    lines = {f: Line(rng.randint(30, 90) * 1000, rng.randint(300, 1500) * 1000) for f in range(families)}
    who = [
        Tenant(f"t{i}", (i % families,), lines[i % families].time(1) * rng.choice((3, 6, 12)), rng.choice((0, 0, 1)))
        for i in range(9)
    ]
    times = gamma(rng, rng.choice((2_000.0, 5_000.0)), rng.choice((1.0, 3.0)))
    arrivals = list(arrive(rng, times, [tenant.name for tenant in who], 150 * MS))
    checked(who, line_catalog(lines, segments=segments, spread=1.1), arrivals)
    assert asked > 20 and kept > 5 and (spared > 5) is (share > 0)


@pytest.mark.parametrize("at_ms", [21, 39])
def test_a_burst_is_a_guess_of_a_rate_wherever_a_window_ends(at_ms):
    """Windows are of 20 ms: fifty requests after two of nearly nothing are no rate yet, in the next window neither."""
    rate = Rate()
    for ms in (*range(1, at_ms, 8), *[at_ms] * 50, at_ms + 2):
        rate.note(ms * MS, 10 * MS)
    assert rate.is_guess
    for ms in range(at_ms + 3, at_ms + 60):
        rate.note(ms * MS, 10 * MS)
    assert not rate.is_guess


@pytest.mark.parametrize(("slo_ms", "widths"), [(6, [0, 3]), (20, [0, 4])])
def test_a_full_run_goes_first_where_the_rest_can_go_with_who_comes(slo_ms, widths):
    """One runs, nine wait for it. A run of eight does more lanes a second, and is next if one more comes meanwhile at
    the rate of ten in two SLOs; else a run of sixteen does all of them soonest."""
    arrivals = [Arrival(at, "t") for at in (0, *range(100_000, 550_000, 50_000))]
    what = line_catalog({0: Line(85_000, 900_000)}, (1, 2, 4, 8, 16))
    run = checked([Tenant("t", (0,), slo_ms * MS)], what, arrivals, keep_log=True)
    made = [c.executable for _, _, commands in run.log for c in commands if isinstance(c, Dispatch)]
    assert made[:2] == widths
    assert run.attainment() == 1.0


def careful_after(bursts: int) -> bool:
    """Ten tenants ask for as much, in so many requests at once; then one has had twice as much as the others."""
    shares, who = Shares(), [Account(Tenant(f"t{i}", (0,), MS)) for i in range(10)]
    rng = Random(1)
    for window in range(200):
        for account in who:
            for _ in range(bursts * (rng.random() < 4 / bursts)):
                shares.excess(account, window * WINDOW_NS)
                shares.charge(account, 1_000, True)
    now_ns = 200 * WINDOW_NS
    for _ in range(100):
        shares.note_refusal()
    for account in who:
        shares.charge(account, 30_000 - account.used_ns, True)
    shares.charge(who[0], 30_000, True)
    return shares.is_careful(who[0], shares.excess(who[0], now_ns), 1_000)


def test_who_asks_in_bursts_may_have_had_more_by_chance():
    assert careful_after(bursts=4)
    assert not careful_after(bursts=40)


@given(
    times=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    slips=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    asked=st.lists(st.integers(1, 100), max_size=8),
    moved=st.integers(0, 6),
)
def test_a_cover_that_follows_another_is_as_one_by_itself(times, slips, asked, moved):
    """What was worked out is taken over as far as runs mostly take what they did; how far they spread may differ."""

    def options(times: list[int], slips: list[int]) -> tuple[Option, ...]:
        pairs = enumerate(zip(times, slips, strict=False))
        return tuple(Option(1 << i, i, ns, ns + slip, ns + slip, ns, slip) for i, (ns, slip) in pairs)

    before = Cover(options(times, [0] * 6))
    for lanes in asked:
        before.until(lanes)
    own = options([ns + (number == moved) for number, ns in enumerate(times)], slips)
    alone, after = Cover(own), Cover(own, before)
    for lanes in range(1, 140):
        assert after.first(lanes) is alone.first(lanes)
        assert after.until(lanes) == alone.until(lanes)


@pytest.mark.parametrize(("seed", "gap_us"), [(0, 100), (2, 100), (6, 100), (0, 400), (1, 400), (4, 400)])
def test_who_can_wait_until_everybody_else_is_done_is_not_refused(seed, gap_us):
    """Where requests for 1 to 40 ms are so many that most are late or refused, and one in ten allows half a minute."""
    rng, now_ns, arrivals = Random(seed), 0, list[Arrival]()
    for number in range(400):
        now_ns += int(rng.expovariate(1) * gap_us * 1000)
        allowed_ns = 30_000 * MS if number % 10 == 0 else (1 + number % 40) * MS
        arrivals.append(Arrival(now_ns, f"t{number % 4}", allowed_ns))
    what = Catalog(tuple(Executable(i, (Entry(0, 0, w),), 2 * MS, 4 * MS) for i, w in enumerate((1, 2, 4, 8))))
    who = [Tenant(f"t{i}", (0,), 5_000 * MS) for i in range(4)]
    run = simulate(Coalescing(), who, what, arrivals, host=Host(50_000, 0, 50_000, 60_000))
    assert all(run.outcomes[number] is Outcome.OK for number in range(0, 400, 10))
    assert run.counts()[Outcome.REFUSED] > 10


def test_who_asks_for_a_lot_at_once_leaves_others_their_places_though_there_is_enough_for_all():
    """A hundred requests every 25 ms, 45% of what the device can do, beside eight tenants that ask for 30% of it. By
    four seeds 99% of theirs are in time, and 95% were where shares were kept past that alone."""
    what = line_catalog({0: Line(50_000, 1_000_000)}, (1, 2, 4, 8, 16), spread=1.05)
    names = [f"t{i}" for i in range(8)]
    who = [Tenant(name, (0,), 10 * MS) for name in (*names, "greedy")]
    shares = []
    for seed in range(1, 5):
        rng = Random(seed)
        lights = arrive(rng, gamma(rng, 2_650.0, 1.0), names, 1_000 * MS)
        bulks = [Arrival(at, "greedy") for at in range(25 * MS, 1_000 * MS, 25 * MS) for _ in range(100)]
        run = checked(who, what, sorted([*lights, *bulks], key=lambda arrival: arrival.time_ns))
        shares.append(run.attainment(names))
    assert fmean(shares) >= 0.98
