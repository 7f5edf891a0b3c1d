"""Whether the runtime serves, and what it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from coalesce.runtime.station import Station


@dataclass(frozen=True)
class Health:
    status: str  # "serving", "degraded" if some of several devices have failed, "failed" or "closed"
    reason: str  # why it failed
    tenants: int
    pending: int  # requests that have not ended
    executables: int  # that are ready
    compiling: int
    failed: Mapping[str, str]  # executables that could not be made or run, and why
    weight_bytes: int  # on the device, room for tenants to come included
    devices: Mapping[str, str]  # each with "serving", "failed" or "closed"
    alone: Mapping[str, str]  # tenants that share no bundles with others, since a check found that they must not

    @property
    def ok(self) -> bool:
        return self.status == "serving"


def health_of(stations: Sequence[Station], tenants: int, closed: bool, alone: Mapping[str, str]) -> Health:
    failures = [station.driver.failure for station in stations if station.driver.failure is not None]
    made = [station.foundry.counts() for station in stations]
    status = "closed" if closed else "serving"
    if failures:
        status = "failed" if len(failures) == len(stations) else "degraded"
    return Health(
        status,
        "; ".join(map(str, failures)),
        tenants,
        sum(len(station.driver.book.tickets) for station in stations),
        sum(ready for ready, _, _ in made),
        sum(compiling for _, compiling, _ in made),
        MappingProxyType({name: why for station in stations for name, why in failed_of(station, len(stations) > 1)}),
        sum(station.device.held_bytes for station in stations),
        MappingProxyType({str(station.device.at): station.status for station in stations}),
        MappingProxyType(dict(alone)),
    )


def failed_of(station: Station, several: bool) -> list[tuple[str, str]]:
    """Families are numbered by device."""
    where = f"{station.device.at}: " if several else ""
    return [(where + name, why) for name, why in station.foundry.counts()[2].items()]
