"""Who hangs, and who only could do nothing: looks by a virtual clock."""

import pytest

from coalesce.errors import DeviceError, ServingError
from coalesce.runtime.inbox import Inbox, Look, MOST
from coalesce.runtime.watchdog import Watchdog
from tests.fake_machine import FakeMachine, Served

pytestmark = pytest.mark.once


def looked(times_s: list[float], overdue: list[bool]) -> list[bool]:
    """Of a device that hangs if it does not come back within 8 s: what each look finds."""
    found, now = list[ServingError](), [0.0]
    is_overdue = iter(overdue)
    error = DeviceError("it hangs")
    watchdog = Watchdog(lambda: error if next(is_overdue) else None, found.append, 8.0, lambda: now[0])
    seen = []
    for now[0] in times_s:
        seen.append(watchdog.look())
    assert found == [error] * sum(seen)
    return seen


def test_a_look_in_time_finds_what_hangs():
    assert looked([1.0, 2.0, 3.1], [False, False, True]) == [False, False, True]


def test_after_a_stop_all_have_as_long_again():
    """At 40 s the process goes on: what was on the device is done soon after."""
    times_s = [1.0, 40.0, *(41.0 + i for i in range(6)), 47.9, 48.0]
    assert looked(times_s, [False, True]) == [False] * 9 + [True]


def test_a_second_stop_starts_anew():
    times_s = [1.0, 40.0, 41.0, 60.0, *(61.0 + i for i in range(8))]
    assert looked(times_s, [False, True]) == [False] * 11 + [True]


def test_who_is_only_a_little_late_finds_it_all_the_same():
    assert looked([1.0, 5.9, 6.9], [False, False, True]) == [False, False, True]


def test_what_goes_first_is_not_behind_a_flood():
    inbox = Inbox()
    for i in range(3 * MOST):
        inbox.put(i)
    inbox.put_first("done")
    inbox.put_first("done too")
    taken = inbox.take(None)
    assert taken == [*range(MOST + 1), "done", "done too"]
    while len(taken) < 3 * MOST + 4:
        taken += inbox.take(0.0)
    assert taken[MOST + 3 :] == [*range(MOST + 1, 3 * MOST), Look(), Look()] and inbox.take(0.0) == []


def test_what_goes_first_has_its_turn_where_there_is_no_flood():
    inbox = Inbox()
    inbox.put("cancelled")
    inbox.put_first("done")
    inbox.put("asked")
    assert inbox.take(None) == ["cancelled", "done", "asked"]


def test_a_bundle_that_has_ended_does_not_hang_while_the_driver_is_busy(monkeypatch):
    """With requests that came before its end, say."""
    machine = FakeMachine()
    with Served(machine) as served:
        own, finisher = served.driver, served.driver._finisher
        own._watchdog.stop()
        put_first, ends = finisher._driver.put_first, list[object]()
        served.driver._launcher._hang_ns = -1
        machine.go.clear()
        reply = served.submit("t0", 1)
        while not reply.running():
            pass
        error = own._overdue()
        monkeypatch.setattr(finisher._driver, "put_first", ends.append)  # which the driver does not see yet
        machine.go.set()
        assert reply.result(10) == ("result", 1)
        assert isinstance(error, DeviceError) and own._overdue() is None
        for end in ends:
            put_first(end)
