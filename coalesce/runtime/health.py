"""Whether the runtime serves, and what it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Health:
    status: str  # "serving", "degraded" if some of several devices have failed, "failed" or "closed"
    reason: str  # why it failed
    tenants: int
    pending: int  # requests that have not ended
    executables: int  # that are offered
    compiling: int
    failed: Mapping[str, str]  # executables that could not be made or run, and why
    weight_bytes: int  # on the device, room for tenants to come included
    devices: Mapping[str, str] = field(default_factory=dict)  # each with "serving", "failed" or "closed"
    alone: Mapping[str, str] = field(default_factory=dict)  # tenants that `verify` keeps from sharing bundles, and why

    @property
    def ok(self) -> bool:
        return self.status == "serving"
