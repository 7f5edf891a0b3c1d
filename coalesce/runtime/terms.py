"""What a tenant is promised and a request is allowed, as the user says it: checked, and in nanoseconds."""

from __future__ import annotations

import math
import time
from typing import Any

from coalesce.errors import InvalidInput


def terms_of(name: str, slo: float, priority: int, weight: float, quota: int) -> dict[str, Any]:
    """The terms of a `Tenant`; raises InvalidInput."""
    if not (math.isfinite(slo) and slo > 0):
        raise InvalidInput(f"tenant {name!r}: slo is {slo}; give seconds, more than 0")
    if not (math.isfinite(weight) and weight > 0):
        raise InvalidInput(f"tenant {name!r}: weight is {weight}; give a share, more than 0")
    if quota < 1:
        raise InvalidInput(f"tenant {name!r}: quota is {quota}; give a number of requests, at least 1")
    return {"slo_ns": round(slo * 1e9), "priority": priority, "weight": float(weight), "quota": quota}


def allowed_ns(name: str, deadline: float) -> int:
    """From now, 0 or less if it has passed; raises InvalidInput."""
    if not math.isfinite(deadline):
        raise InvalidInput(f"tenant {name!r}: deadline is {deadline}; give seconds from now, a finite number")
    return round(deadline * 1e9)


def left_s(until: float | None) -> float | None:
    """Of a time limit, by the monotonic clock."""
    return None if until is None else max(0.0, until - time.monotonic())
