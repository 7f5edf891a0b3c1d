"""What a runtime took, out of its log: from a run of the simulator, of which everything is known."""

from collections.abc import Sequence
from random import Random

import pytest

from coalesce.scheduler.catalog import Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import Event, Timer
from coalesce.scheduler.machine import Host, Line, line_catalog
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.run import Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import arrive_apart
from experiments.measured_machine import BLOCK_NS, host_of, MeasuredDevice, MeasuredHost, Moment, Ran, Stretches, Woken

pytestmark = pytest.mark.once

US = 1_000
HOST = Host(decide_ns=20 * US, wake_ns=80 * US)
CATALOG = line_catalog({0: Line(100 * US, 900 * US)}, (1, 2, 4), spread=1.0)
TENANTS = [Tenant(f"t{i}", (0,), 2_500 * US) for i in range(4)]


def run(host: Host, **options: object) -> Run:
    arrivals = arrive_apart(Random(3), 1.0, {tenant.name: 300.0 for tenant in TENANTS}, 400_000 * US)
    return simulate(Coalescing(), TENANTS, CATALOG, arrivals, host=host, keep_log=True, **options)  # pyright: ignore


def test_a_host_is_found_in_its_log():
    found = host_of([run(HOST).log])
    for kind, times in found.wakes.items():
        assert len(times.times_ns) > 20 and set(times.times_ns) == {HOST.wake_ns}, kind
    assert {*found.busy[True].times_ns, *found.busy[False].times_ns} == {HOST.decide_ns}


def test_a_run_comes_out_again():
    first = run(HOST)
    times = {executable.entries: executable.l50_ns for executable in CATALOG.executables}
    ran = [Ran(form, waited, ns) for form, ns in times.items() for waited in (False, True)]
    device = MeasuredDevice([ran])
    second = run(host_of([first.log]), takes=device.takes, watchers=[device.see])  # pyright: ignore
    assert second.log == first.log and 20 < device.in_time(second) < len(second.requests)


class Hiccup:
    """As HOST, but that one decision takes long."""

    def __init__(self) -> None:
        self.decisions = 0

    def __getattr__(self, name: str) -> object:
        return getattr(HOST, name)

    def decide(self, event: Event, commands: Sequence[Command]) -> int:
        self.decisions += 1
        return 30_000 * US if self.decisions == 150 else HOST.decide_ns


def test_what_was_slow_once_is_found_once():
    log = run(Hiccup()).log  # pyright: ignore
    found = host_of([log])
    busy, woken = ([took for own in times.values() for took in own.times_ns] for times in (found.busy, found.wakes))
    assert len(busy) == len(log) - 1  # as many as there are decisions that another one follows
    assert sum(took > 1_000 * US for took in (*busy, *woken)) == 1


def test_a_bundle_that_waits_behind_another_takes_less():
    (one, two, _) = (executable.entries for executable in CATALOG.executables)
    device = MeasuredDevice([[Ran(one, False, 50), Ran(one, True, 30), Ran(one, True, 20), Ran(two, False, 70)]])
    first, second = (replace_id(entries) for entries in (one, two))
    assert [device.takes(first, Random(0)) for _ in range(4)] == [50, 30, 20, 30]
    assert device.takes(second, Random(0)) == 70
    assert device.takes(Executable(9, (), 11, 11), Random(0)) == 11


def test_what_ran_in_none_takes_what_it_took_in_others_and_a_run_longer_if_it_is_disturbed():
    (one, two, _) = (executable.entries for executable in CATALOG.executables)
    others = [[Ran(one, False, 60)], [Ran(two, False, 70)]]
    device = MeasuredDevice([[Ran(one, False, 50)]], others, lambda begin_ns, took_ns: begin_ns + took_ns)
    assert device.takes(replace_id(one), Random(0)) == 50 + (0 + 50)
    assert device.takes(replace_id(two), Random(0)) == 70 + (100 + 70)


def test_stretches_have_their_turns_and_what_was_slow_together_is_so_again():
    """Of two stretches the second is twice as slow, but for its first block; each is heard half of the time."""
    ms = [number * 1_000_000 for number in range(0, 2000, 10)]
    first, second = ([Moment(at_ns, ns * (1 + (at_ns >= BLOCK_NS))) for at_ns in ms] for ns in (10, 20))
    times, others = Stretches([first, second]), Stretches([first[::3], second[::3]])
    took = [times.take(now_ns) for now_ns in ms]
    assert took == [10] * 25 + [40] * 25 + ([20] * 25 + [40] * 25) * 3
    assert [others.take(now_ns) for now_ns in ms[::3]] == took[::3]


def replace_id(entries: tuple) -> Executable:
    return Executable(0, entries, 1, 1)


def test_who_wakes_up_beside_a_run_waits_for_a_core_until_it_is_done():
    """It takes 5 on an idle device, 70 beside a run; one that has 20 left is told of 25 later, one with 80 left 70."""
    idle, beside = ([[Moment(0, ns)]] for ns in (5, 70))
    kinds = {
        Woken(ended, busy): Stretches(beside if busy else idle) for ended in (False, True) for busy in (False, True)
    }
    host = MeasuredHost(kinds, {}, lambda: 0)
    assert [host.wake(False, busy_ns) for busy_ns in (0, 20, 80)] == [5, 25, 70]


def test_a_log_that_says_nothing_is_a_host_that_takes_no_time():
    host = host_of([[]])
    assert (host.wake(True, 0), host.tell(), host.decide(Timer(), []), host.dispatch()) == (0, 0, 0, 0)
