"""What is taken on is in time, at twice of what can be served, on a host that hiccups: what is not kept of promises is
kept back of the next ones (`promises`)."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from statistics import fmean

import pytest

from coalesce.scheduler import promises
from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.events import Completed
from coalesce.scheduler.invariants import Checker
from coalesce.scheduler.lanes import Lane
from coalesce.scheduler.levels import Levels
from coalesce.scheduler.load import WHOLE_NS
from coalesce.scheduler.machine import SerialHost, spread_out
from coalesce.scheduler.promises import MEMORY, MOST, OF_ALL, PAST, Promises, RARELY
from coalesce.scheduler.request import Request, Tenant
from coalesce.scheduler.run import Outcome, quantile, Run
from coalesce.scheduler.shares import Account
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import arrive, poisson, SECOND

pytestmark = pytest.mark.once

US, MS = 1_000, 1_000_000
SLO = 10 * MS
WIDTHS, DEVICE_US = (1, 4, 16), (550, 750, 1300)  # of one segment, as an H200 has 16 ResNet-50
NAMES = [f"t{i}" for i in range(16)]
WARM_S, UNTIL_S = 0.3, 1.5  # after the first of them the policy knows the host


@dataclass(frozen=True)
class Hiccuping(SerialHost):
    """Whatever it does takes some milliseconds longer once in a while."""

    chance: float = 0.0
    more_ns: int = 0

    def _drawn(self, ns: int) -> int:
        own = super()._drawn(ns)
        return own + int(self.rng.expovariate(1) * self.more_ns) if self.rng.random() < self.chance else own


BUSY = (18, 200, 300, 50, 500, 20)  # microseconds, as SerialHost has them: a bundle of 16 takes 2 ms
QUICK = (12, 150, 250, 35, 350, 10)
QUICKER = (4, 60, 250, 10, 200, 5)


def serve(micros: tuple[int, ...], hiccups: float, segments: int, rate: float, seed: int, spread: float = 2.0) -> Run:
    made = [
        Executable(i + len(WIDTHS) * s, (Entry(0, s, w),), ns := us * US // segments, ns * 11 // 10)
        for s in range(segments)
        for i, (w, us) in enumerate(zip(WIDTHS, DEVICE_US, strict=True))
    ]
    who = [Tenant(name, (0,), SLO) for name in NAMES]
    return serve_them(who, Catalog(tuple(made), {0: segments}), micros, hiccups, 3 * MS, rate, seed, spread)


def serve_two_kinds(rate: float, seed: int) -> Run:
    """Whose requests are due after 9 and 5.5 ms, in turns."""
    made = [
        Executable(i + len(WIDTHS) * f, (Entry(f, 0, w),), us * US, us * US * 11 // 10)
        for f in (0, 1)
        for i, (w, us) in enumerate(zip(WIDTHS, DEVICE_US, strict=True))
    ]
    who = [Tenant(name, (i % 2,), (9_000, 5_500)[i % 2] * US) for i, name in enumerate(NAMES)]
    return serve_them(who, Catalog(tuple(made)), QUICKER, 0.004, 3 * MS // 2, rate, seed, 2.0)


def serve_them(
    who: list[Tenant],
    what: Catalog,
    micros: tuple[int, ...],
    hiccups: float,
    more_ns: int,
    rate: float,
    seed: int,
    spread: float,
) -> Run:
    times = [us * US for us in micros]
    host = Hiccuping(Random(seed + 7), *times, wake_ns=60 * US, spread=spread, chance=hiccups, more_ns=more_ns)
    rng, checker = Random(seed), Checker(depth=3)
    run = simulate(
        Coalescing(),
        who,
        what,
        arrive(rng, poisson(rng, rate), NAMES, round(UNTIL_S * SECOND)),
        takes=lambda executable, rng: spread_out(executable.l50_ns, 1.1, rng),
        host=host,
        seed=seed,
        watchers=[checker.see],
    )
    assert checker.finish()[:5] == []
    return run


def taken(run: Run) -> tuple[float, int]:
    """Of what was taken on: the share that was in time, and the latency of 99% of the results."""
    since_ns = round(WARM_S * SECOND)
    counts = run.counts(None, since_ns)
    waited = sorted(
        ended_ns - request.arrival_ns
        for request, outcome, ended_ns in zip(run.requests, run.outcomes, run.ends_ns, strict=True)
        if request.arrival_ns >= since_ns and outcome in (Outcome.OK, Outcome.LATE)
    )
    all_of_them = counts[Outcome.OK] + counts[Outcome.LATE] + counts[Outcome.DROPPED]
    return counts[Outcome.OK] / all_of_them, quantile(waited, 0.99)


@pytest.mark.parametrize(("micros", "hiccups", "segments", "rate", "served"), [
    (BUSY, 0.002, 1, 14_000.0, 6_900),
    (BUSY, 0.0, 1, 21_000.0, 5_700),
    (QUICK, 0.0, 3, 5_600.0, 3_000),
    (QUICK, 0.0, 3, 8_400.0, 3_200),
], ids=["hiccups, twice", "thrice", "three segments, twice", "three segments, thrice"])  # fmt: skip
def test_what_is_taken_on_is_in_time_far_past_what_can_be_served(micros, hiccups, segments, rate, served):
    """Before anything was kept back 97.9, 93.0, 96.3 and 91.7% of it was, with a p99 above the SLO in ten of twelve
    runs, and 7,110, 5,720, 2,690 and 2,180 a second were served; since then 99.4% at least, and 7,330, 6,150, 3,130
    and 3,340."""
    runs = [serve(micros, hiccups, segments, rate, seed) for seed in (1, 2, 3)]
    for run in runs:
        share, p99_ns = taken(run)
        assert share >= 0.985 and p99_ns <= SLO
    assert fmean([run.goodput(round(WARM_S * SECOND)) for run in runs]) >= served


@pytest.mark.parametrize(("segments", "least", "served"), [(2, 0.99, 3_300), (3, 0.95, 1_900)])
def test_what_the_host_takes_between_segments_is_counted(segments, least, served):
    """It takes the same each time: a segment of some 0.5 ms, and 1.2 until the next one has begun. When that was not
    counted 64 and 37% of what was taken on was in time, and 2,380 and 880 a second were served."""
    runs = [serve(BUSY, 0.0, segments, 14_000.0, seed, spread=1.0) for seed in (1, 2)]
    assert fmean([taken(run)[0] for run in runs]) >= least
    assert fmean([run.goodput(round(WARM_S * SECOND)) for run in runs]) >= served


def test_who_is_due_sooner_does_not_take_what_was_kept(monkeypatch):
    """By six seeds 98.6 instead of 97.6% of what was taken on is in time, and 0.5 instead of 0.9% of the results are
    late, where it is not a newcomer's time alone that is kept."""
    runs = [serve_two_kinds(20_000.0, seed) for seed in (1, 4)]
    assert fmean([taken(run)[0] for run in runs]) >= 0.98
    assert fmean([late_of_results(run) for run in runs]) <= 0.008
    monkeypatch.setattr(promises, "OF_ALL", 0.0)
    before = [serve_two_kinds(20_000.0, seed) for seed in (1, 4)]
    assert fmean([taken(run)[0] for run in before]) <= 0.978
    assert fmean([late_of_results(run) for run in before]) >= 0.01
    served, served_before = (fmean([run.goodput(round(WARM_S * SECOND)) for run in each]) for each in (runs, before))
    assert served >= 0.97 * served_before


def late_of_results(run: Run) -> float:
    counts = run.counts(None, round(WARM_S * SECOND))
    return counts[Outcome.LATE] / (counts[Outcome.OK] + counts[Outcome.LATE])


def test_nothing_is_kept_back_where_no_more_is_asked_than_can_be_done(monkeypatch):
    """Whoever is late of a hiccup there takes nobody else's place."""
    usual = serve(BUSY, 0.02, 1, 4_000.0, 1)
    assert taken(usual)[0] < 1 - 1 / RARELY, "promises are not kept"
    monkeypatch.setattr(promises, "MOST", 0.0)
    assert serve(BUSY, 0.02, 1, 4_000.0, 1).outcomes == usual.outcomes


def a_lane(arrival_ns: int = PAST * SLO) -> Lane:
    request = Request(0, "t", 0, arrival_ns, arrival_ns + SLO)
    return Lane(request, Account(Tenant("t", (0,), SLO)), Levels().get(0), 0, 0, None)


def ended(promises: Promises, late_ns: int, results_ns: int = 0, suspects: bool = False) -> None:
    """A bundle, whose lane was taken on with what is kept back now. Its results are told with the next one."""
    lane = a_lane()
    promises.end(lane, Completed(0, 0, lane.request.deadline_ns + late_ns, results_ns=results_ns), suspects)


def test_of_everybodys_time_half_is_kept_once_too_much_was_asked_for_34_ms():
    promises = Promises()
    for _ in range(8):
        ended(promises, MS)
    assert promises.share > 0
    assert promises.spared(WHOLE_NS - 1) == (0.0, 0)
    assert promises.spared(WHOLE_NS) == (promises.share * OF_ALL, WHOLE_NS // PAST)
    promises.note_load(False, 3 * WHOLE_NS)
    assert promises.spared(3 * WHOLE_NS) == (0.0, 0)
    ended(promises, MS, suspects=True)
    assert promises.spared(9 * WHOLE_NS) == (0.0, 0)


def shares(lates_ns: list[int]) -> list[float]:
    """What is kept back after each."""
    promises, found = Promises(), []
    for late_ns in [*lates_ns, 0]:
        ended(promises, late_ns)
        found.append(promises.share)
    return found[1:]


def test_nothing_is_kept_back_where_everybody_is_in_time():
    assert set(shares([-MS] * 20 + [0] * 20)) == {0.0}


def test_what_was_late_is_kept_back_and_no_more_than_a_fifth():
    assert shares([MS])[-1] == pytest.approx(0.1)
    assert shares([90 * MS] * 5)[-1] == MOST


def test_who_was_in_time_by_what_was_kept_back_still_needs_it():
    promises, lane = Promises(), a_lane()
    due_ns = lane.request.deadline_ns
    promises.note(lane, due_ns + MS)
    for _ in range(MEMORY):
        promises.note(lane, due_ns)
    assert promises.share == pytest.approx(0.1)
    for _ in range(MEMORY):  # and who has more time to spare does not
        promises.note(lane, due_ns - 2 * MS)
    assert promises.share == 0.0


def test_one_hiccup_among_many_bundles_keeps_nothing_back():
    assert set(shares([-MS] * MEMORY + [50 * MS] * 2 + [-MS] * MEMORY)) == {0.0}


def test_a_host_that_is_quiet_again_is_believed_after_as_many_bundles_as_are_remembered():
    assert shares([50 * MS] * MEMORY + [-3 * MS] * (MEMORY - 2))[-1] == 0.0


def test_results_that_are_late_count():
    promises = Promises()
    ended(promises, -MS)
    ended(promises, -MS, results_ns=3 * MS)
    assert promises.share == pytest.approx(0.2)


def test_what_is_slow_by_suspects_says_nothing_of_promises():
    promises = Promises()
    for _ in range(20):
        ended(promises, 5 * MS, suspects=True)
    assert promises.share == 0.0
    ended(promises, 5 * MS)
    ended(promises, 5 * MS)
    now_ns = PAST * SLO
    assert promises.share and promises.kept(now_ns + SLO, now_ns)
    ended(promises, 0, suspects=True)
    assert not promises.kept(now_ns + SLO, now_ns)


def test_nothing_is_kept_back_of_who_comes_to_what_was_idle_a_moment_ago():
    promises = Promises()
    lane = a_lane()
    promises.note(lane, lane.request.deadline_ns + MS)
    promises.since_ns = 100 * MS
    for waited_ns, kept in ((PAST * SLO - 1, 0.0), (PAST * SLO, 0.1)):
        now_ns = promises.since_ns + waited_ns
        assert promises.kept(now_ns + SLO, now_ns) == pytest.approx(kept)
