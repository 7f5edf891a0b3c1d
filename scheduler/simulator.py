"""A policy on a virtual clock: the loop of the real driver, with a heap of events in place of threads and a device.

    simulate(policy, tenants, catalog, arrivals, ...) -> Run

What arrives, completes or happens is told to the policy in the order of its times, as the driver would tell it, and
what the policy answers is done (`simulation`). Nothing is drawn but from `seed`: equal arguments give equal runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop

from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.costs import FAR
from coalesce.scheduler.events import CatalogChanged, Completed, Event, Submitted, TenantAdded, Timer
from coalesce.scheduler.faults import Faults
from coalesce.scheduler.machine import Compiler, HostTimes, PROMPT, quantiles, Takes
from coalesce.scheduler.policy import Policy
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.run import Run, Watcher
from coalesce.scheduler.simulation import Simulation
from coalesce.scheduler.tuples import made
from coalesce.scheduler.workloads import Arrival

TIMER = Timer()


def simulate(
    policy: Policy,
    tenants: Iterable[Tenant],
    catalog: Catalog,
    arrivals: Iterable[Arrival],
    *,
    happenings: Iterable[tuple[int, Event]] = (),
    takes: Takes = quantiles,
    host: HostTimes = PROMPT,
    faults: Faults | None = None,
    compiler: Compiler | None = None,
    until_ns: int = FAR,
    seed: int = 0,
    keep_log: bool = False,
    watchers: Sequence[Watcher] = (),
) -> Run:
    """Run until everything has ended, or until a time.

    Args:
      tenants, catalog: what there is at the beginning; requests of others can come once `happenings` add them.
      arrivals: ascending in time. The first one is request 0, and so on.
      happenings: (time, event): cancellations by the number of the arrival, tenants that come and go, other catalogs,
        the end (`Closed`).
      takes: how long an executable runs on the device; by default as its quantiles in the catalog say.
      faults: what goes wrong. Without it nothing does.
      compiler: makes what the policy wants. Without it nothing is made.
      keep_log: keep every decision in `Run.log`.
      watchers: called with every decision, such as `Checker.see` of `invariants`.
    """
    run = Run()
    simulation = Simulation(policy, run, takes, host, faults, compiler, seed, keep_log, watchers)
    simulation.plan([(0, CatalogChanged(catalog)), *((0, TenantAdded(tenant)) for tenant in tenants), *happenings])
    if host is PROMPT:
        go_promptly(simulation, iter(arrivals), until_ns)
    else:
        go(simulation, iter(arrivals), until_ns, host)
    return run


def go_promptly(simulation: Simulation, arrivals: Iterator[Arrival], until_ns: int) -> None:
    """Where the host takes no time: what happens is told when it happens."""
    heap, run, request_of, tell = simulation.heap, simulation.run, simulation.request, simulation.tell
    arrival = next(arrivals, None)
    while arrival is not None and (now_ns := arrival[0]) < until_ns:
        if simulation.wake_ns <= now_ns or (heap and heap[0][0] <= now_ns):
            pass_to(simulation, now_ns + 1)
        run.end_ns = now_ns
        requests = (request_of(arrival),)
        arrival = next(arrivals, None)
        while arrival is not None and arrival[0] <= now_ns:
            requests = (*requests, request_of(arrival))
            arrival = next(arrivals, None)
        tell(made(Submitted, (requests,)), now_ns)
    pass_to(simulation, until_ns)


def pass_to(simulation: Simulation, end_ns: int) -> None:
    """What happens before that time, and whenever the policy wants to be woken."""
    heap, run = simulation.heap, simulation.run
    while True:
        now_ns, happens = simulation.wake_ns, False
        if heap and heap[0][0] <= now_ns:
            now_ns, happens = heap[0][0], True
        if now_ns >= end_ns:
            return
        run.end_ns = now_ns
        if happens:
            simulation.happen(heappop(heap), now_ns)
        else:
            simulation.tell(TIMER, now_ns)


def go(simulation: Simulation, arrivals: Iterator[Arrival], until_ns: int, host: HostTimes) -> None:
    """Where it does: what happens is told when the driver is done with what it is at, or wakes up."""
    heap, tell, request_of = simulation.heap, simulation.tell, simulation.request
    arrival = next(arrivals, None)
    while True:
        arrival_ns = arrival.time_ns if arrival is not None else FAR
        next_ns = simulation.wake_ns
        happens = bool(heap) and heap[0][0] <= next_ns
        if happens:
            next_ns = heap[0][0]
        time_ns = min(arrival_ns, next_ns)
        if time_ns >= until_ns:
            return
        busy_ns = simulation.driver_ns
        if time_ns < busy_ns:
            now_ns = busy_ns
        else:
            now_ns = time_ns + host.wake(happens and next_ns == time_ns, max(0, simulation.device_ns - time_ns))
        simulation.run.end_ns = now_ns
        if heap and heap[0][0] <= now_ns and isinstance(heap[0][2], Completed):
            at_ns, serial, event = heappop(heap)
            if arrival_ns <= now_ns:
                event = event._replace(followed=True)
            simulation.happen((at_ns, serial, event), now_ns)
        elif arrival_ns < next_ns:
            together = []
            while arrival is not None and arrival.time_ns <= min(now_ns, next_ns):
                together.append(request_of(arrival))
                arrival = next(arrivals, None)
            tell(Submitted(tuple(together)), now_ns)
        elif happens:
            simulation.happen(heappop(heap), now_ns)
        else:
            tell(TIMER, now_ns)
