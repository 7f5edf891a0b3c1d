"""The checker of what is always true: it says nothing of logs that are right, and finds each thing that is wrong."""

import pytest

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.commands import Dispatch, Quarantine, Readmit, Reason, Reject, WakeAt
from coalesce.scheduler.events import (
    Cancelled,
    CatalogChanged,
    Closed,
    Completed,
    Submitted,
    TenantAdded,
    TenantRemoved,
    Timer,
)
from coalesce.scheduler.invariants import check, Checker
from coalesce.scheduler.request import Request, Tenant
from coalesce.scheduler.run import Decision, Outcome

pytestmark = pytest.mark.once

ONE, TWO, NEXT = Executable(1, (Entry(0, 0, 1),), 10, 10), Executable(2, (Entry(0, 0, 2),), 10, 10), 3
CATALOG = Catalog(
    (ONE, TWO, Executable(NEXT, (Entry(1, 0, 2),), 10, 10), Executable(4, (Entry(1, 1, 2),), 10, 10)), {1: 2}, {1: 2}
)
SETUP = [
    Decision(CatalogChanged(CATALOG), 0, ()),
    Decision(TenantAdded(Tenant("a", (0, 1), 100, quota=3)), 0, ()),
    Decision(TenantAdded(Tenant("b", (0, 1), 100, quota=3)), 0, ()),
]


def asked(number: int, tenant: str = "a", family: int = 0, deadline_ns: int = 100) -> Request:
    return Request(number, tenant, family, 1, deadline_ns)


def came(*requests: Request) -> Submitted:
    return Submitted(requests)


def run(bundle: int, *numbers: int, executable: int = 2) -> Dispatch:
    return Dispatch(bundle, executable, (numbers,), 10, 10)


WAKE = WakeAt(50)
AB = came(asked(0), asked(1, "b"))

RIGHT = {
    "together": [(AB, 1, [run(0, 0, 1)]), (Completed(0, 1, 11), 11, [])],
    "two segments": [
        (came(asked(0, family=1)), 1, [run(0, 0, executable=NEXT)]),
        (Completed(0, 1, 11), 11, [run(1, 0, executable=4)]),
        (Completed(1, 11, 21), 21, []),
    ],
    "refused": [(AB, 1, [Reject(0, Reason.INFEASIBLE), Reject(1, Reason.INFEASIBLE)])],
    "patient": [(AB, 1, [WakeAt(5)]), (Timer(), 5, [run(0, 0, 1)]), (Completed(0, 5, 9), 10, [])],
    "expired": [(AB, 1, [WAKE]), (Timer(), 100, [Reject(0, Reason.EXPIRED), Reject(1, Reason.EXPIRED)])],
    "cancelled": [
        (AB, 1, [WAKE]),
        (Cancelled(1), 2, [Reject(1, Reason.CANCELLED), run(0, 0, executable=1)]),
        (Cancelled(0), 3, []),
        (Cancelled(0), 4, []),
        (Completed(0, 2, 12), 12, []),
    ],
    "failed": [
        (AB, 1, [run(0, 0, 1)]),
        (Completed(0, 1, 11, failed=True), 11, [run(1, 0, executable=1), WAKE]),
        (Completed(1, 11, 21, failed=True), 21, [Reject(0, Reason.FAILED), run(2, 1, executable=1)]),
        (Completed(2, 21, 31), 31, []),
    ],
    "full": [
        (came(*map(asked, range(4))), 1, [Reject(3, Reason.QUEUE_FULL), WAKE]),
        (Closed(drain=False), 2, [Reject(i, Reason.SHUTDOWN) for i in range(3)]),
        (came(asked(4)), 3, [Reject(4, Reason.SHUTDOWN)]),
    ],
    "gone": [
        (AB, 1, [WAKE]),
        (TenantRemoved("a", drain=False), 2, [Reject(0, Reason.TENANT_CLOSED), run(0, 1)]),
        (came(asked(2)), 3, [Reject(2, Reason.UNKNOWN_TENANT)]),
    ],
    "in any order": [(came(asked(3)), 1, [WAKE]), (came(asked(2, "b")), 2, [run(0, 3, 2)])],
    "another of its name": [
        (AB, 1, [run(0, 0, executable=1), run(1, 1, executable=1)]),
        (Completed(0, 1, 11), 11, [Quarantine("a")]),
        (Completed(1, 11, 21), 21, []),
        (TenantRemoved("a", drain=True), 22, []),
        (TenantAdded(Tenant("a", (0,), 100)), 23, []),
        (came(asked(2), asked(3, "b")), 24, [run(2, 2, 3)]),
    ],
}

WRONG = {
    "time goes back": [(Timer(), 5, []), (Timer(), 4, [])],
    "came twice": [(came(asked(3)), 1, [run(0, 3)]), (came(asked(3)), 2, [WAKE])],
    "is in bundles 0 and 1": [(AB, 1, [run(0, 0, 1), run(1, 0)])],
    "has ended or never came": [(AB, 1, [run(0, 0, 1), Reject(7, Reason.INFEASIBLE)])],
    "holds request 0, which has ended": [(AB, 1, [Reject(0, Reason.INFEASIBLE), run(0, 0, 1)])],
    "which is in bundle 0": [(AB, 1, [run(0, 0, 1), Reject(0, Reason.INFEASIBLE)])],
    "came instead of 0": [(AB, 1, [run(1, 0, 1)])],
    "ended before 0": [(AB, 1, [run(0, 0), run(1, 1)]), (Completed(1, 1, 11), 11, [])],
    "began before the last one ended": [
        (AB, 1, [run(0, 0), run(1, 1)]),
        (Completed(0, 1, 11), 11, []),
        (Completed(1, 5, 15), 15, []),
    ],
    "bundle 0 ran at": [(AB, 5, [run(0, 0, 1)]), (Completed(0, 3, 11), 11, [])],
    "what is not there": [(AB, 1, [run(0, 0, 1, executable=9)])],
    "has other entries": [(AB, 1, [Dispatch(0, 2, ((0,), (1,)), 10, 10)])],
    "3 lanes in": [(came(*map(asked, range(3))), 1, [run(0, 0, 1, 2)])],
    "is empty": [(AB, 1, [run(0), WAKE])],
    "and runs at (1, 0)": [(AB, 1, [run(0, 0, 1, executable=NEXT)])],
    "and runs at (1, 1)": [(came(asked(0, family=1)), 1, [run(0, 0, executable=4)])],
    "runs after its deadline": [(came(asked(0, deadline_ns=4)), 5, [run(0, 0)])],
    "waits whose deadline was 4": [(came(asked(0, deadline_ns=4)), 3, [WakeAt(5)]), (Timer(), 5, [WAKE])],
    "waits that expires at 4": [(came(asked(0, deadline_ns=4)), 3, [WAKE])],
    "runs, though Reason.CANCELLED": [(AB, 1, [WAKE]), (Cancelled(0), 2, [run(0, 0, 1)])],
    "runs, though Reason.TENANT_CLOSED": [(AB, 1, [WAKE]), (TenantRemoved("a", drain=False), 2, [run(0, 0, 1)])],
    "lanes of family 1 in 2 slots": [
        (came(*(asked(i, family=1) for i in range(3))), 1, [run(0, 0, 1, executable=NEXT), run(1, 2, executable=NEXT)])
    ],
    "some in quarantine": [(AB, 1, [Quarantine("a"), run(0, 0, 1)])],
    "'c' is put into quarantine, and is in it, or not here": [(AB, 1, [Quarantine("c"), run(0, 0, 1)])],
    "'a' is put into quarantine, and is in it, or not here": [(AB, 1, [Quarantine("a"), Quarantine("a"), run(0, 0)])],
    "let out of quarantine, where it is not": [
        (Timer(), 1, [Quarantine("a")]),
        (TenantRemoved("a", drain=True), 2, []),
        (TenantAdded(Tenant("a", (0,), 100)), 3, [Readmit("a")]),
    ],
    "ran too often": [
        (AB, 1, [run(0, 0, 1)]),
        (Completed(0, 1, 11, failed=True), 11, [run(1, 0, 1)]),
        (Completed(1, 11, 21, failed=True), 21, [run(2, 0, 1)]),
        (Completed(2, 21, 31, failed=True), 31, [WAKE]),
    ],
    "who is not here": [(came(asked(0, "c")), 1, [WAKE])],
    "over quota": [(came(*map(asked, range(4))), 1, [WAKE])],
    "nothing is to happen": [(AB, 1, [])],
    "idle since 1, and wakes at 50": [(AB, 1, [WAKE])],
    "3 bundles are on the device": [(came(*map(asked, range(3))), 1, [run(i, i) for i in range(3)])],
    "wakes at 5": [(Timer(), 5, [WakeAt(5)])],
    **{
        f"{Reject(0, reason)}, without reason": [(AB, 1, [Reject(0, reason), run(0, 1)])]
        for reason in Reason
        if reason is not Reason.INFEASIBLE
    },
}


def violations(log, **options) -> list[str]:
    return check([*SETUP, *(Decision(*decision) for decision in log)], **options)


@pytest.mark.parametrize("log", RIGHT.values(), ids=RIGHT.keys())
def test_what_is_right_passes(log):
    assert violations(log, depth=2) == []


@pytest.mark.parametrize(("otherwise", "log"), WRONG.items(), ids=WRONG.keys())
def test_what_is_wrong_is_found(otherwise, log):
    assert otherwise in "\n".join(violations(log, depth=2, patience_ns=20))


def test_a_policy_may_serve_what_is_late():
    checker = Checker(serves_late=True)
    late = came(asked(0, deadline_ns=4))
    for decision in [*SETUP, (late, 3, [WAKE]), (Timer(), 50, [run(0, 0)]), (Completed(0, 50, 60), 60, [])]:
        checker.see(*decision)
    assert checker.finish() == [] and checker.outcomes[Outcome.LATE] == 1


def test_requests_are_counted_by_their_ends():
    checker = Checker()
    for decision in [*SETUP, *RIGHT["failed"], (came(asked(2), asked(3)), 40, [Reject(3, Reason.INFEASIBLE), WAKE])]:
        checker.see(*decision)
    assert checker.finish() == []
    assert +checker.outcomes == {Outcome.OK: 1, Outcome.FAILED: 1, Outcome.REFUSED: 1, Outcome.PENDING: 1}
    assert checker.submitted == 4
