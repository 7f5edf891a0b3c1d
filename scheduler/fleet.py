"""Several devices: which tenants go where, and what each device makes of what is sent to it.

    place       tenants of one family onto one device, within memory and load, so that their requests share runs
    simulate_fleet      every device with a policy of its own; requests go to where their tenant is

Devices know nothing of each other, as the drivers of a runtime: a fleet is as many simulations side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.policy import Policy
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.run import Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import Arrival


class Need(NamedTuple):
    """What a tenant takes of a device."""

    load: float  # of its time, in runs that it shares with its family; 1 is all of it
    bytes: int = 0


@dataclass
class Site:
    """A device, and what it has."""

    memory: int
    load: float = 0.0
    tenants: list[str] = field(default_factory=list)

    def takes(self, need: Need) -> bool:
        return need.bytes <= self.memory and self.load + need.load <= 1.0

    def take(self, names: Iterable[str], need: Need) -> None:
        self.tenants += names
        self.memory -= need.bytes
        self.load += need.load


def place(tenants: Sequence[Tenant], needs: Mapping[str, Need], devices: int, memory: int) -> dict[str, int]:
    """The device of each tenant. Families go as a whole, the largest first, to the device with the least load that has
    the memory; one that no device can take is spread, tenant by tenant.

    Raises:
      ValueError: a tenant has more bytes than any device has left.
    """
    sites = [Site(memory) for _ in range(devices)]
    families: dict[int, list[str]] = {}
    for tenant in tenants:
        families.setdefault(tenant.families[0], []).append(tenant.name)
    wholes = {family: total(needs[name] for name in names) for family, names in families.items()}
    for family in sorted(families, key=lambda family: -wholes[family].load):
        names, whole = families[family], wholes[family]
        site = min((s for s in sites if s.takes(whole)), key=lambda s: s.load, default=None)
        if site is not None:
            site.take(names, whole)
            continue
        for name in sorted(names, key=lambda name: -needs[name].load):
            roomy = [s for s in sites if needs[name].bytes <= s.memory]
            if not roomy:
                free = max(s.memory for s in sites)
                raise ValueError(f"tenant {name!r} needs {needs[name].bytes:,} bytes, and {free:,} are free at most")
            min(roomy, key=lambda s: s.load).take([name], needs[name])
    return {name: number for number, site in enumerate(sites) for name in site.tenants}


def total(needs: Iterable[Need]) -> Need:
    each = list(needs)
    return Need(sum(need.load for need in each), sum(need.bytes for need in each))


def simulate_fleet(
    make_policy: Callable[[], Policy],
    placed: Mapping[str, int],
    tenants: Sequence[Tenant],
    catalog: Catalog,
    arrivals: Iterable[Arrival],
    **options: Any,
) -> list[Run]:
    """A run of each device; `options` are those of `simulate`."""
    devices = max(placed.values(), default=-1) + 1
    routed: list[list[Arrival]] = [[] for _ in range(devices)]
    for arrival in arrivals:
        routed[placed[arrival.tenant]].append(arrival)
    runs = []
    for device, own in enumerate(routed):
        here = [tenant for tenant in tenants if placed[tenant.name] == device]
        families = {family for tenant in here for family in tenant.families}
        runs.append(simulate(make_policy(), here, restricted(catalog, families), own, **options))
    return runs


def restricted(catalog: Catalog, families: set[int]) -> Catalog:
    """To what these can run in."""
    kept = tuple(e for e in catalog.executables if all(entry.family in families for entry in e.entries))
    return Catalog(kept, catalog.segments, catalog.slots)
