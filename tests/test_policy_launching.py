"""The host brings bundles to the device one after another: what comes next is decided when it can take it on."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random
from statistics import fmean
from typing import NamedTuple

import pytest
from hypothesis import given, strategies as st

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Dispatch, WakeAt
from coalesce.scheduler.events import CatalogChanged, Completed, Event, Submitted, TenantAdded, Timer
from coalesce.scheduler.flight import Bundle, Flight, Lead
from coalesce.scheduler.invariants import Checker
from coalesce.scheduler.machine import lanes_of, SerialHost, spread_out
from coalesce.scheduler.request import Request, Tenant
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import arrive_apart, SECOND

pytestmark = pytest.mark.once

US, MS = 1_000, 1_000_000


def bundle(number: int, ns: int) -> Bundle:
    return Bundle(number, 0, (), ns, ns, ns)


def done(number: int, end_ns: int) -> Completed:
    return Completed(number, 0, end_ns)


def takes_at(flight: Flight[Bundle], now_ns: int, host_ns: int = 0) -> int:
    return flight.takes_at(flight.free_at(now_ns), host_ns)


def test_a_bundle_begins_when_those_before_it_are_done_and_the_host_has_brought_it():
    flight = Flight[Bundle]()
    assert takes_at(flight, 100, 20) == 100
    flight.add(bundle(0, 10), 100, 30)
    assert takes_at(flight, 100, 20) == 150  # at 130 the host has brought the first one, at 150 this one
    flight.add(bundle(1, 100), 105, 30)
    assert takes_at(flight, 110, 20) == 210  # the device: 110, and 100 more
    flight.complete(done(0, 140))
    assert takes_at(flight, 140, 20) == 240
    flight.complete(done(1, 240))
    assert takes_at(flight, 250, 20) == 250


@given(steps=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50), st.booleans()), max_size=30))
def test_a_host_that_takes_no_time_changes_nothing(steps):
    """The device is free when what is believed of its bundles says so."""
    flight, now_ns, began_ns = Flight[Bundle](), 0, 0
    for number, (passed_ns, ns, ends) in enumerate(steps):
        now_ns += passed_ns
        if ends and flight.bundles:
            flight.complete(done(flight.bundles[0].id, now_ns))
            began_ns = now_ns
        else:
            began_ns = began_ns if flight.bundles else max(began_ns, now_ns)
            flight.add(bundle(number, ns), now_ns)
        times = [b.l50_ns for b in flight.bundles]
        assert takes_at(flight, now_ns) == (max(now_ns, began_ns + times[0]) + sum(times[1:]) if times else now_ns)


def brought(host_ns: int, device_ns: int, *, failed: bool = False) -> Completed:
    """Of a device that waited for it."""
    return Completed(0, 0, host_ns + device_ns, failed, host_ns, brought_ns=host_ns)


def test_a_failed_flight_says_nothing_of_the_host():
    lead = Lead(5)
    lead.learn(0, brought(100, 10))
    lead.learn(0, brought(100_000, 10, failed=True))
    assert (lead.most_ns, lead.host_ns, lead.of(0)) == (100, 100, 100)


def test_each_executable_takes_the_host_a_time_of_its_own():
    """Images take 70 to bring, and words 10."""
    lead, images, words = Lead(5), 0, 1
    for _ in range(16):
        lead.learn(images, brought(70, 60))
        lead.learn(words, brought(10, 50))
    assert (lead.of(images), lead.of(words), lead.most_ns) == (70, 10, 70)
    assert lead.of(2) == lead.host_ns and 10 < lead.host_ns < 70, "of one that has not run what any takes"
    assert lead.is_short(words), "who brings images is done after such a run"
    assert lead.is_short(images) and not lead.is_short(2)
    lead.forget_all_but([words])
    assert lead.of(images) == lead.most_ns == lead.host_ns, "what takes its place may take that"
    lead.learn(None, brought(90, 60))  # of an executable that is not offered any more
    assert lead.of(images) == lead.most_ns == lead.host_ns > 10


def test_a_host_that_is_never_done_in_time_brings_nothing_earlier():
    lead = Lead(5)
    for _ in range(16):
        lead.learn(0, brought(70, 60))
    assert not lead.is_short(0)


class Served(NamedTuple):
    p99_ms: float
    lanes: float  # that a bundle has
    late: int


WIDTHS = (1, 2, 4, 8, 16)
RUN_MS = (1.18, 1.24, 1.35, 1.5, 1.98)  # with 0.6 ms of the host in it


def serve(rate: float, host_ms: float, told: bool, seed: int = 1) -> Served:
    """A second of requests; the host brings bundles one after another, and the device runs them. With `told`, the
    policy is told what the host takes."""
    policy, random, events = Coalescing(), Random(seed), list[tuple[int, int, Event | int]]()
    made = (Executable(i, (Entry(0, 0, w),), int(RUN_MS[i] * MS), int(RUN_MS[i] * MS)) for i, w in enumerate(WIDTHS))
    policy.on_event(CatalogChanged(Catalog(tuple(made))), 0)
    policy.on_event(TenantAdded(Tenant("t", (0,), 13 * MS)), 0)
    arrived, at, waits = list[int](), 0.0, list[int]()
    while (at := at + random.expovariate(rate)) < 1.0:
        heappush(events, (int(at * 1e9), len(arrived), len(arrived)))
        arrived.append(int(at * 1e9))
    brought_ns = free_ns = ended_ns = bundles = 0
    running: dict[int, Sequence[int]] = {}
    wake_ns = -1
    while events:
        now_ns, _, event = heappop(events)
        if isinstance(event, int):
            event = Submitted((Request(event, "t", 0, now_ns, now_ns + 13 * MS),))
        elif isinstance(event, Completed):
            waits += [now_ns - arrived[i] for i in running.pop(event.bundle)]
        elif now_ns != wake_ns:
            continue
        wake_ns = -1
        for command in policy.on_event(event, now_ns):
            if isinstance(command, WakeAt):
                wake_ns = command.time_ns
                heappush(events, (wake_ns, -1, Timer()))
            elif isinstance(command, Dispatch):
                bundles += 1
                running[command.bundle] = [i for own in command.lanes for i in own]
                brought_ns = max(brought_ns, now_ns) + int(host_ms * MS)
                free_ns = max(free_ns, brought_ns) + int((RUN_MS[command.executable] - min(host_ms, 0.6)) * MS)
                told_ns = int(host_ms * MS) if told else 0
                begun_ns = max(ended_ns, now_ns)
                end = Completed(command.bundle, begun_ns, free_ns, host_ns=told_ns, brought_ns=brought_ns)
                heappush(events, (free_ns, -2 - command.bundle, end))
                ended_ns = free_ns
    assert len(waits) >= 0.99 * len(arrived)
    waits.sort()
    return Served(waits[len(waits) * 99 // 100] / MS, len(waits) / bundles, sum(ns > 13 * MS for ns in waits))


@pytest.mark.parametrize("rate", [1000, 4000])
@pytest.mark.parametrize("host_ms", [0.3, 0.6, 1.0, 2.0])
def test_lanes_are_not_fixed_for_nothing_where_the_host_takes_longest(rate, host_ms):
    """99% wait no longer than for the bundle that they just missed, their own, and 0.6 of one more; and no longer than
    where nothing is known of the host, but for what a run more or less in the queue makes."""
    told, untold = serve(rate, host_ms, told=True), serve(rate, host_ms, told=False)
    assert told.late == 0
    assert told.p99_ms <= 1.05 * untold.p99_ms
    if host_ms >= 1:
        assert told.p99_ms <= 2.6 * host_ms + 0.6


IMAGES, WORDS = 0, 1  # families, and their executables
TAKES_US = {IMAGES: (70, 100), WORDS: (10, 50)}  # the host, and then the device


class Hand:
    """A policy that has learnt what both take; it is told what is due to be told, and nothing ends but by hand."""

    def __init__(self) -> None:
        self.policy, self.now_ns, self.number = Coalescing(lead_ns=0), 0, 0
        self.flying: list[tuple[int, int]] = []  # bundles, and families
        self.wake_ns: int | None = None
        made = [Executable(own, (Entry(own, 0, 1),), sum(us) * US, sum(us) * US) for own, us in TAKES_US.items()]
        self.tell(CatalogChanged(Catalog(tuple(made))))
        for family in TAKES_US:
            self.tell(TenantAdded(Tenant(f"t{family}", (family,), 100 * MS)))
        for family in [IMAGES, WORDS] * 16:
            self.ask(family)
            host_us, device_us = TAKES_US[family]
            self.now_ns += (host_us + device_us) * US
            bundle, _ = self.flying.pop()
            host_ns, brought_ns = host_us * US, self.now_ns - device_us * US
            self.tell(Completed(bundle, brought_ns - host_ns, self.now_ns, host_ns=host_ns, brought_ns=brought_ns))
            self.now_ns += MS

    def tell(self, event: Event) -> None:
        self.wake_ns = None
        for command in self.policy.on_event(event, self.now_ns):
            if isinstance(command, Dispatch):
                self.flying.append((command.bundle, command.executable))
            elif isinstance(command, WakeAt):
                self.wake_ns = command.time_ns

    def ask(self, family: int) -> None:
        self.tell(Submitted((Request(self.number, f"t{family}", family, self.now_ns, self.now_ns + 100 * MS),)))
        self.number += 1

    def wait(self, us: int) -> None:
        until_ns = self.now_ns + us * US
        while self.wake_ns is not None and self.wake_ns <= until_ns:
            self.now_ns = max(self.now_ns, self.wake_ns)
            self.tell(Timer())
        self.now_ns = until_ns

    @property
    def families(self) -> list[int]:
        return [family for _, family in self.flying]


@pytest.mark.parametrize(("waiting", "flying"), [
    ([IMAGES], [WORDS, WORDS, IMAGES]),
    ([WORDS], [WORDS, WORDS]),
    ([WORDS, IMAGES], [WORDS, WORDS, IMAGES]),  # due first, though words waited when there was no place for them
])  # fmt: skip
def test_a_third_bundle_is_brought_where_the_second_one_is_short(waiting, flying):
    """Images take 70 to bring, and words run for 50: nothing else is brought behind two bundles."""
    hand = Hand()
    hand.ask(WORDS)
    hand.ask(WORDS)
    hand.wait(40)
    assert hand.families == [WORDS, WORDS]
    for wait_us, family in zip((13, 5), waiting, strict=False):  # words would go after 80, and images after 50
        slo_ns = (90 if family == IMAGES else 100) * MS
        request = Request(hand.number, f"t{family}", family, hand.now_ns, hand.now_ns + slo_ns)
        hand.number += 1
        hand.tell(Submitted((request,)))
        hand.wait(wait_us)
    assert hand.families == flying, "the first one would be done after 60"


def test_no_third_bundle_is_brought_behind_a_long_one():
    hand = Hand()
    for _ in range(3):
        hand.ask(IMAGES)
    hand.wait(1000)
    assert hand.families == [IMAGES, IMAGES]


def test_what_takes_the_place_of_executables_is_brought_as_early():
    """What has replaced both may take as long as any has."""
    hand = Hand()
    made = [Executable(2 + own, (Entry(own, 0, 1),), 160 * US, 160 * US) for own in TAKES_US]
    hand.tell(CatalogChanged(Catalog(tuple(made))))
    hand.ask(WORDS)
    begun_ns = hand.now_ns
    hand.ask(WORDS)
    assert hand.wake_ns is not None and 110 * US <= hand.wake_ns - begun_ns <= 130 * US  # about 40 before 160


@dataclass(frozen=True)
class Images(SerialHost):
    """A host that copies 60 us for a lane of the first few executables, and 3 for one of the others."""

    def bring(self, command: Dispatch) -> int:
        lane_ns = (60 if command.executable < len(DEVICE_US[0]) else 3) * US
        return self._drawn(self.bundle_ns + lanes_of(command) * lane_ns)


LANES = (1, 4, 8, 16)
DEVICE_US = (355, 385, 450, 654), (480, 600, 750, 1350)  # eight ResNet-50 and eight BERT-base on an H200
SLOS_US = 12_570, 6_000


def test_images_are_brought_while_words_run():
    """Of 9,500 requests a second 99.9% are in time: 96% where the host's time was one average, and words ran for less
    time than it takes to bring images."""
    took = [us for own in DEVICE_US for us in own]
    entries = [Entry(family, 0, width) for family in (0, 1) for width in LANES]
    made = [Executable(i, (entry,), took[i] * US, took[i] * US) for i, entry in enumerate(entries)]
    tenants = [Tenant(f"t{i}", (i % 2,), SLOS_US[i % 2] * US) for i in range(16)]
    attained = []
    for seed in (1, 2, 3):
        host = Images(Random(seed + 7), *(us * US for us in (25, 120, 100, 0, 60, 5)), wake_ns=100 * US, spread=2.0)
        checker = Checker(depth=3)
        run = simulate(
            Coalescing(),
            tenants,
            Catalog(tuple(made)),
            arrive_apart(Random(seed), 1.0, {tenant.name: 9_500 / 16 for tenant in tenants}, SECOND),
            takes=lambda executable, rng: spread_out(took[executable.id] * US, 1.05, rng),
            host=host,
            seed=seed,
            watchers=[checker.see],
        )
        assert checker.finish()[:5] == []
        attained.append(run.attainment(None, SECOND // 4))
    assert fmean(attained) >= 0.99
