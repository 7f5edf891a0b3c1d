"""Whether the runtime serves, and what it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Health:
    status: str  # "serving", "closed" or "failed"
    reason: str  # why it failed
    tenants: int
    pending: int  # requests that have not ended
    executables: int  # that are ready
    compiling: int
    failed: Mapping[str, str]  # executables that could not be made, and why
    weight_bytes: int  # on the device, room for tenants to come included

    @property
    def ok(self) -> bool:
        return self.status == "serving"


def health_of(
    failure: Exception | None,
    closed: bool,
    tenants: int,
    pending: int,
    made: tuple[int, int, dict[str, str]],
    held: int,
) -> Health:
    status = "failed" if failure is not None else "closed" if closed else "serving"
    ready, compiling, failed = made
    return Health(status, str(failure or ""), tenants, pending, ready, compiling, MappingProxyType(failed), held)
