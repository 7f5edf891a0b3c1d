"""The baseline policies, on timelines that can be checked by hand. Nothing is dispatched ahead unless it is said."""

import pytest

from coalesce.scheduler.baselines.clockwork import Clockwork
from coalesce.scheduler.baselines.edf import Edf
from coalesce.scheduler.baselines.fifo import Fifo
from coalesce.scheduler.baselines.last_runs import LastRuns
from coalesce.scheduler.baselines.menu import Menu
from coalesce.scheduler.baselines.packing import Packing
from coalesce.scheduler.baselines.symphony import Symphony
from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.commands import Reason, Want
from coalesce.scheduler.events import CatalogChanged, Closed, TenantAdded, TenantRemoved, Timer
from coalesce.scheduler.latency import LatencyModel, Prediction
from coalesce.scheduler.policy import Policy
from coalesce.scheduler.request import Tenant
from tests.by_hand import catalog_of, Hand, MS

pytestmark = pytest.mark.once

TIMES = {1: 2.0, 2: 2.5, 4: 3.5}  # milliseconds of a run, by its width
A, B = Tenant("a", (0,), 20 * MS, quota=8), Tenant("b", (0,), 20 * MS)
POLICIES = {
    "fifo": Fifo,
    "edf": Edf,
    "clockwork": Clockwork,
    "clockwork apart": lambda **options: Clockwork(apart=True, **options),
    "symphony": Symphony,
    "packing": Packing,
    "packing deferred": lambda **options: Packing(defer=True, **options),
}


def serve(policy: Policy, catalog: Catalog | None = None, tenants: tuple[Tenant, ...] = (A, B)) -> Hand:
    return Hand(policy, catalog or catalog_of(TIMES), tenants)


@pytest.fixture(params=list(POLICIES))
def any_policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param](depth=1)


# What each of them is


def test_fifo_takes_turns_in_the_order_of_arrival():
    hand = serve(Fifo(depth=1))
    hand.submit(0, ("a", 20), ("b", 5), ("a", 10))
    hand.finish(2)
    assert hand.dispatched == [[0], [1], [2]]


def test_edf_takes_turns_by_deadline():
    hand = serve(Edf(depth=1))
    hand.submit(0, ("a", 20), ("b", 5), ("a", 10))
    hand.finish(2)
    assert hand.dispatched == [[1], [2], [0]]


def test_clockwork_runs_the_batch_that_has_to_start_first():
    catalog = catalog_of(TIMES, families=2)
    hand = serve(Clockwork(depth=1), catalog, (Tenant("a", (0,), 20 * MS), Tenant("b", (1,), 20 * MS)))
    hand.submit(0, ("a", 20))
    hand.submit(0, ("a", 12), ("a", 12), ("a", 12), ("a", 12), ("a", 12))
    hand.submit(0, ("b", 11), family=1)
    hand.finish(2)
    # Four of family 0 have to start by 12 - 3.5, before the one of family 1 by 11 - 2, though that is due earlier.
    assert hand.dispatched == [[0], [1, 2, 3, 4], [6], [5]]


def test_clockworks_batch_is_as_wide_as_its_head_can_wait_for():
    hand = serve(Clockwork(depth=1))
    hand.submit(0, ("a", 20))
    hand.submit(0, ("a", 4.5), ("a", 9), ("b", 9), ("b", 9))
    hand.complete(2)
    assert hand.dispatched == [[0], [1, 2]]  # 2.5 ms are left: two lanes take that long
    hand.finish(3)
    assert hand.dispatched[2] == [3, 4]


def test_clockwork_can_keep_tenants_apart():
    hand = serve(Clockwork(apart=True, depth=1))
    hand.submit(0, ("a", 20), ("b", 20), ("a", 20), ("b", 20))
    hand.finish(3)
    assert hand.dispatched == [[0, 2], [1, 3]]


def test_symphony_waits_until_a_wider_batch_would_be_late():
    hand = serve(Symphony(depth=1))
    hand.submit(0, ("a", 20), ("b", 20))
    assert hand.dispatched == [] and hand.wake_ms == 16.5  # four lanes by 20 take 3.5
    hand.submit(10, ("a", 20), ("b", 20))
    assert hand.dispatched == [[0, 1, 2, 3]]  # as wide as there is


def test_symphony_runs_what_it_has_when_the_window_opens():
    hand = serve(Symphony(depth=1))
    hand.submit(0, ("a", 20), ("b", 20))
    hand.wake()
    assert hand.dispatched == [[0, 1]] and hand.now_ns == 16.5 * MS


def test_symphony_drops_heads_that_would_make_the_batch_small():
    hand = serve(Symphony(depth=1))
    hand.submit(0, ("a", 20), ("a", 20), ("a", 20), ("a", 20))
    hand.submit(1, ("a", 5), ("b", 19), ("b", 19), ("b", 19))
    hand.complete(3.5)
    assert hand.ended[4] is Reason.INFEASIBLE  # due at 6, it could have run with one other
    assert hand.dispatched[1] == [5, 6, 7]


def test_packing_keeps_the_head_however_small_the_batch():
    hand = serve(Packing(depth=1))
    hand.submit(0, ("a", 20), ("a", 20), ("a", 20), ("a", 20))
    hand.submit(1, ("a", 5), ("b", 19), ("b", 19), ("b", 19))
    hand.complete(3.5)
    assert hand.dispatched == [[0, 1, 2, 3], [4, 5]]


def test_packing_can_wait_for_the_latest_moment():
    hand = serve(Packing(defer=True, depth=1))
    hand.submit(0, ("a", 20))
    assert hand.dispatched == [] and hand.wake_ms == 17.5  # two lanes by 20 take 2.5
    hand.submit(5, ("b", 15))
    assert hand.wake_ms == 16.5
    hand.wake()
    assert hand.dispatched == [[0, 1]]


def test_packing_packs_without_waiting_otherwise():
    hand = serve(Packing(depth=1))
    hand.submit(0, ("a", 20), ("b", 9), ("b", 9))
    assert hand.dispatched == [[1, 2, 0]]


# What all of them do


def test_all_are_policies(any_policy):
    assert isinstance(any_policy, Policy)


def test_nothing_runs_that_would_be_late(any_policy):
    hand = serve(any_policy)
    hand.submit(0, ("a", 20), ("a", 20), ("a", 20), ("a", 20))
    while not hand.running:
        hand.wake()
    (late,) = hand.submit(hand.now_ns / MS, ("b", 2.1))
    hand.finish(3.5)
    assert hand.ended[late] in (Reason.INFEASIBLE, Reason.EXPIRED)
    assert late not in [i for ids in hand.dispatched for i in ids]


def test_a_deadline_that_passes_ends_a_request_while_the_device_is_held_up(any_policy):
    hand = serve(any_policy)
    hand.submit(0, ("a", 2))  # it has to go at once
    (waits,) = hand.submit(0, ("b", 10))
    hand.tell(Timer(), 9)  # the first one takes much longer
    assert hand.ended == {waits: Reason.INFEASIBLE}


def test_the_dead_and_the_unknown_are_refused_at_submit(any_policy):
    hand = serve(any_policy)
    dead, unknown = hand.submit(1, ("a", 0), ("nobody", 10))
    assert hand.ended == {dead: Reason.EXPIRED, unknown: Reason.UNKNOWN_TENANT}


def test_a_tenant_has_no_more_waiting_than_its_quota(any_policy):
    hand = serve(any_policy)
    ids = hand.submit(0, *[("a", 500.0)] * 10, *[("b", 500.0)] * 10)
    assert {i for i, how in hand.ended.items() if how is Reason.QUEUE_FULL} == set(ids[8:10])


def test_cancelled_requests_do_not_run_and_those_that_run_end_with_their_bundle(any_policy):
    hand = serve(any_policy)
    runs = hand.submit(0, ("a", 2))[0]
    waits = hand.submit(0, ("b", 20))[0]
    for request in (runs, waits, waits, 99):
        hand.cancel(request)
    assert hand.ended == {waits: Reason.CANCELLED}
    hand.finish(2)
    assert hand.ended[runs] is None and hand.dispatched == [[runs]]


def test_a_cancelled_request_goes_no_further_than_its_segment(any_policy):
    hand = serve(any_policy, catalog_of(TIMES, segments=2))
    runs = hand.submit(0, ("a", 4))[0]
    hand.cancel(runs)
    hand.complete(2)
    assert hand.ended == {runs: Reason.CANCELLED} and not hand.running


def test_lanes_go_through_all_segments(any_policy):
    hand = serve(any_policy, catalog_of({1: 1.0, 2: 1.5}, segments=3))
    ids = hand.submit(0, ("a", 30), ("b", 30))
    while len(hand.ended) < 2:
        hand.complete(hand.now_ns / MS + 1.5) if hand.running else hand.wake()
    assert hand.ended == dict.fromkeys(ids) and all(sum(i in own for own in hand.dispatched) == 3 for i in ids)


def test_a_request_that_cannot_reach_its_last_segment_in_time_is_not_begun(any_policy):
    hand = serve(any_policy, catalog_of({1: 1.0}, segments=3))
    (late,) = hand.submit(0, ("a", 2.9))
    assert hand.ended == {late: Reason.INFEASIBLE} and not hand.dispatched


def test_no_more_lanes_begin_than_have_a_slot(any_policy):
    hand = serve(any_policy, catalog_of({1: 1.0, 2: 1.5, 4: 2.0}, segments=2, slots={0: 3}))
    ids = hand.submit(0, *[("a", 100.0)] * 6)
    begun: set[int] = set()
    while len(hand.ended) < len(ids):
        hand.complete(hand.now_ns / MS + 2) if hand.running else hand.wake()
        begun |= {i for own in hand.dispatched for i in own}
        assert len(begun - hand.ended.keys()) <= 3
    assert set(hand.ended.values()) == {None}


def test_higher_priorities_go_first(any_policy):
    hand = serve(any_policy)
    hand.submit(0, ("a", 2))
    low = hand.submit(0, *[("a", 30)] * 4)
    high = hand.submit(0, *[("b", 40)] * 4, priority=1)
    while len(hand.ended) < 9:
        hand.complete(hand.now_ns / MS + 2)
    order = [i for own in hand.dispatched[1:] for i in own]
    assert order == [*high, *low]


def test_lower_priorities_run_while_higher_ones_wait_for_more():
    hand = serve(Symphony(depth=1))
    high = hand.submit(0, ("a", 40), priority=1)
    low = hand.submit(0, ("a", 30), ("a", 30), ("a", 30), ("a", 30))
    assert hand.dispatched == [low]
    hand.complete(3.5)
    hand.wake()
    assert hand.dispatched == [low, high]


def test_a_lane_that_fails_fails_alone_and_the_others_run_again_apart():
    hand = serve(Packing(depth=1))
    ids = hand.submit(0, ("a", 100), ("b", 100), ("a", 100), ("b", 100))
    bad = ids[2]
    while hand.running:
        hand.complete(hand.now_ns / MS + 3.5, failed=bad in hand.dispatched[-1])
    assert hand.ended == {i: Reason.FAILED if i == bad else None for i in ids}
    assert hand.dispatched == [[0, 1, 2, 3], [0, 1], [2, 3], [2], [3]]


def test_a_request_that_fails_alone_has_failed(any_policy):
    hand = serve(any_policy)
    (bad,) = hand.submit(0, ("a", 2))
    hand.complete(2, failed=True)
    assert hand.ended == {bad: Reason.FAILED}


def test_a_removed_tenant_is_drained_or_ended(any_policy):
    for drain in (True, False):
        policy = POLICIES["edf"](depth=1) if drain else any_policy
        hand = serve(policy)
        runs = hand.submit(0, ("a", 2))[0]
        waits = hand.submit(0, ("a", 30))[0]
        hand.tell(TenantRemoved("a", drain))
        refused = hand.submit(0, ("a", 30))[0]
        hand.finish(2)
        assert hand.ended == {runs: None, waits: None if drain else Reason.TENANT_CLOSED, refused: Reason.TENANT_CLOSED}
        later = hand.submit(10, ("a", 30))[0]
        assert hand.ended[later] is Reason.UNKNOWN_TENANT
        hand.tell(TenantAdded(A))
        again = hand.submit(11, ("a", 2))[0]
        hand.finish(2)
        assert hand.ended[again] is None


def test_closing_ends_what_waits_and_takes_on_nothing(any_policy):
    hand = serve(any_policy)
    runs = hand.submit(0, ("a", 2))[0]
    waits = hand.submit(0, ("b", 30))[0]
    hand.tell(Closed(drain=False))
    assert hand.ended == {waits: Reason.SHUTDOWN}
    refused = hand.submit(1, ("b", 30))[0]
    hand.finish(1)
    assert hand.ended == {waits: Reason.SHUTDOWN, refused: Reason.SHUTDOWN, runs: None}


def test_without_an_executable_requests_wait_for_one(any_policy):
    hand = serve(any_policy, Catalog())
    waits, expires = hand.submit(0, ("a", 30), ("a", 5))
    assert not hand.ended and hand.wake_ms is not None
    hand.wake()
    assert hand.ended == {expires: Reason.EXPIRED}
    hand.catalog = catalog_of({1: 2.0})
    hand.tell(CatalogChanged(hand.catalog), 10)
    hand.finish(2)
    assert hand.ended == {expires: Reason.EXPIRED, waits: None}


def test_the_next_bundle_is_dispatched_before_the_last_one_ends():
    hand = serve(Edf(depth=2, lead_ns=MS // 2))
    hand.submit(0, ("a", 20), ("b", 20))
    assert hand.dispatched == [[0]] and hand.wake_ms == 1.5
    hand.wake()
    assert hand.dispatched == [[0], [1]]


def test_a_wider_executable_is_asked_for_once_a_second_while_it_is_missing():
    hand = serve(Packing(depth=1), catalog_of({1: 2.0}))
    hand.submit(0, ("a", 20), ("b", 20), ("b", 20))
    hand.finish(2)
    assert hand.wants == [Want((Entry(0, 0, 2),))]
    hand.submit(1500, ("a", 20), ("b", 20), ("b", 20))
    assert len(hand.wants) == 2


def test_no_wider_executable_is_asked_for_that_would_be_late():
    hand = serve(Packing(depth=1), catalog_of({1: 6.0}))
    hand.submit(0, ("a", 11), ("b", 11), ("b", 11))
    assert not hand.wants


def test_one_by_one_asks_for_nothing_wider():
    hand = serve(Fifo(depth=1), catalog_of({1: 2.0}))
    hand.submit(0, ("a", 20), ("b", 20), ("b", 20))
    hand.finish(2)
    assert not hand.wants


# How long runs take


def run_of(executable: int, actual_ms: float) -> Prediction:
    return Prediction(0, executable, 1, 0, 0, round(actual_ms * MS))


def test_clockwork_goes_by_the_largest_of_the_last_ten_runs():
    latency = LastRuns()
    latency.change(Catalog((Executable(0, (Entry(0, 0, 1),), 2 * MS, 3 * MS),)))
    assert latency.of(0) == (2 * MS, 3 * MS)
    for ms in (9.0, *[4.0] * 5, *[5.0] * 5):
        latency.observe(run_of(0, ms), frozenset("a"))
    assert latency.of(0) == (5 * MS, 5 * MS)  # the 9 is the eleventh
    assert not latency.observe(run_of(7, 1.0), frozenset("a"))


def test_a_prediction_that_rules_everybody_out_does_not_end_service_for_good():
    hand = serve(Clockwork(depth=1), Catalog((Executable(0, (Entry(0, 0, 1),), 2 * MS, 50 * MS),)))
    hand.submit(0, ("a", 10))
    hand.finish(2)
    assert hand.ended == {0: None}


def test_times_to_the_end_of_a_program_count_its_later_segments():
    menu = Menu(LatencyModel())
    wide = tuple(Executable(i, (Entry(0, 0, w),), 2 * w * MS, 3 * w * MS) for i, w in enumerate((1, 4)))
    narrow = (Executable(9, (Entry(0, 1, 2),), 10 * MS, 11 * MS),)
    menu.change(Catalog(wide + narrow, {0: 2}))
    assert [o.through for o in menu.of((0, 0))] == [(12 * MS, 14 * MS), (28 * MS, 34 * MS)]
    assert menu.of((1, 0)) == ()
    menu.change(Catalog(wide, {0: 2}))
    assert menu.of((0, 0)) == ()
