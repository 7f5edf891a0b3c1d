"""Who goes leaves nothing behind, and nothing is held against another one of its name."""

from collections.abc import Callable
from random import Random

import pytest

from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Dispatch, Quarantine, Readmit, WakeAt
from coalesce.scheduler.events import CatalogChanged, Completed, Event, Submitted, TenantAdded, TenantRemoved, Timer
from coalesce.scheduler.invariants import Checker
from coalesce.scheduler.quarantine import State, Watch
from coalesce.scheduler.request import Request, Tenant
from coalesce.scheduler.slots import Slots
from coalesce.scheduler.tenancy import Tenancy
from tests.simulated import catalog, MS
from tests.test_policy_levels import Calls

pytestmark = pytest.mark.once
BAD, GOOD = Tenant("bad", (0,), 1000 * MS), Tenant("good", (0,), 1000 * MS)


def tenancy_of(count: int) -> Tenancy:
    tenancy = Tenancy()
    for i in range(count):
        tenancy.add(Tenant(f"t{i}", (i % 2,), 1000 * MS))
    return tenancy


@pytest.mark.inside
def test_who_goes_takes_no_longer_for_those_that_stay():
    counts: dict[int, list[int]] = {20: [], 200: []}
    for tenants in [20, 200] * 8:  # what an earlier test left behind may end meanwhile
        tenancy = tenancy_of(tenants)
        with Calls() as calls:
            tenancy.leave(tenancy.accounts["t0"])
        counts[tenants].append(calls.count)
    assert min(counts[200]) == min(counts[20]) > 0


@pytest.mark.parametrize("seed", range(5))
def test_the_least_slo_of_a_family_is_that_of_who_is_here(seed):
    rng, tenancy = Random(seed), Tenancy()
    here: dict[str, Tenant] = {}
    for _ in range(200):
        before = dict(tenancy.tightest_ns)
        name = f"t{rng.randrange(8)}"
        account = tenancy.get(name)
        if account is not None and rng.random() < 0.5:
            account.pending = rng.randrange(2)  # some stay for a while, and may be removed again or come back
            changed = tenancy.leave(account)
            here.pop(name, None)
        else:
            here[name] = Tenant(name, tuple(rng.sample(range(3), rng.randint(1, 3))), rng.randint(1, 4))
            changed = tenancy.add(here[name])
        slos = {f: [own.slo_ns for own in here.values() if f in own.families] for f in range(3)}
        assert tenancy.tightest_ns == {family: min(own) for family, own in slos.items() if own}
        assert changed is (tenancy.tightest_ns != before)


class Device:
    """On which everything of a tenant fails that runs alone, or is slow."""

    def __init__(self) -> None:
        self.policy, self.checker = Coalescing(), Checker(depth=2)
        self.now_ns, self.asked = 0, 0
        self.flying: list[Dispatch] = []
        self.told: list[Quarantine | Readmit] = []
        for event in CatalogChanged(catalog(widths=(1, 2, 4))), TenantAdded(BAD), TenantAdded(GOOD):
            self.tell(event)

    def tell(self, event: Event) -> None:
        commands = self.policy.on_event(event, self.now_ns)
        self.checker.see(event, self.now_ns, commands)
        self.flying += [command for command in commands if isinstance(command, Dispatch)]
        self.told += [command for command in commands if isinstance(command, Quarantine | Readmit)]
        if not self.flying and any(isinstance(command, WakeAt) for command in commands):
            self.now_ns += MS
            self.tell(Timer())

    def ask(self, *names: str) -> None:
        first, due_ns = self.asked, self.now_ns + 1000 * MS
        self.asked += len(names)
        self.tell(Submitted(tuple(Request(first + i, own, 0, self.now_ns, due_ns) for i, own in enumerate(names))))

    def end(self, failed: bool = False, took_ns: int = MS) -> None:
        begun_ns, self.now_ns = self.now_ns, self.now_ns + took_ns
        self.tell(Completed(self.flying.pop(0).bundle, begun_ns, self.now_ns, failed))

    def fail(self) -> None:
        """Often enough to be put into quarantine."""
        for _ in range(3):
            self.ask("bad")
            self.end(failed=True)
        assert self.told == [Quarantine("bad", failed=True)]


def idle(device: Device) -> None:
    device.tell(TenantRemoved("bad", drain=True))


def stopped(device: Device) -> None:
    device.tell(TenantRemoved("bad", drain=False))


def while_it_waits(device: Device, drain: bool) -> None:
    device.ask("good")
    device.ask("bad")
    device.tell(TenantRemoved("bad", drain))
    while device.flying:
        device.end()


def while_it_runs(device: Device, drain: bool, failed: bool = False) -> None:
    """And its last run ends well, or not."""
    device.ask("bad", "bad")
    device.tell(TenantRemoved("bad", drain))
    while device.flying:
        device.end(failed, took_ns=40 * MS)


WAYS: dict[str, Callable[[Device], None]] = {
    "idle": idle,
    "stopped": stopped,
    "waits": lambda device: while_it_waits(device, True),
    "waits, stopped": lambda device: while_it_waits(device, False),
    "runs": lambda device: while_it_runs(device, True),
    "runs, stopped": lambda device: while_it_runs(device, False),
    "fails": lambda device: while_it_runs(device, True, True),
    "fails, stopped": lambda device: while_it_runs(device, False, True),
}


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_nothing_is_held_against_another_one_of_its_name(way, held):
    device = Device()
    if held:
        device.fail()
    else:  # one failure more would be enough
        for _ in range(2):
            device.ask("bad")
            device.end(failed=True)
    way(device)
    assert device.policy.waiting == 0
    assert not device.policy._watch.standings and not device.policy._watch._failures
    device.tell(TenantAdded(BAD))
    told = len(device.told)
    for _ in range(2):
        device.ask("bad")
        device.end(failed=True)
    for _ in range(4):
        device.ask("good", "bad", "good", "bad")
        assert [len(own) for own in device.flying[0].lanes] == [4]
        device.end()
        device.now_ns += 400 * MS  # longer than a quarantine, in all
    assert device.told[told:] == []
    assert device.checker.finish() == []


def test_a_family_that_nobody_runs_takes_no_place():
    """Families come with tenants and go with them, and each has a number of its own."""
    slots = Slots()
    slots.change({7: 2})
    for family in 7, 8:  # without a limit too: it may get one
        slots.take(family, 2)
        slots.release(family)
    assert slots.room(7) == 1
    for family in 7, 8:
        slots.release(family)
    assert slots.room(7) == 2 and not slots._held


def test_a_slow_run_that_began_before_a_tenant_was_put_apart_changes_nothing():
    """It was in flight by then: whoever is in quarantine stays there, and nobody who was with it is suspected."""
    watch = Watch()
    for i in range(3):
        watch.fail("guilty", i)
    assert watch.standings["guilty"].state is State.QUARANTINED
    lot = watch.lot("guilty")
    for i in range(10):
        assert watch.see(["guilty", "other"], 10**9, 10**6, 10 + i) == []
    assert watch.standings.keys() == {"guilty"} and watch.lot("guilty") == lot
    assert watch.standings["guilty"].state is State.QUARANTINED
