"""What a tenant is promised and a request is allowed, as the user says it: checked, and in nanoseconds."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from coalesce.errors import InvalidInput

LONG_S = 1e9  # longer than any runtime lives
LEAST, MOST = 1e-9, 1e9  # weights: sums and quotients of them stay numbers


def terms_of(name: str, slo: float, priority: int, weight: float, quota: int) -> dict[str, Any]:
    """The terms of a `Tenant`; raises InvalidInput."""
    if not isinstance(name, str):
        raise InvalidInput(f"tenant {name!r}: a name is a str, not a {type(name).__name__}")
    if not is_positive(slo):
        raise InvalidInput(f"tenant {name!r}: slo is {slo!r}; give seconds, more than 0")
    if not (is_positive(weight) and LEAST <= weight <= MOST):
        raise InvalidInput(f"tenant {name!r}: weight is {weight!r}; give a share, more than 0, from {LEAST} to {MOST}")
    if not is_count(quota):
        raise InvalidInput(f"tenant {name!r}: quota is {quota!r}; give a number of requests, at least 1")
    priority = priority_of(name, priority)
    return {"slo_ns": ns_of(slo), "priority": priority, "weight": float(weight), "quota": int(quota)}


def shapes_of(name: str, example: Any, examples: Any) -> list[tuple[Any, ...]]:
    """The inputs of a request, for each shape that requests have; raises InvalidInput."""
    given = [example] if examples is None else examples
    if (example is None) == (examples is None) or not isinstance(given, list | tuple) or not given:
        raise InvalidInput(f"tenant {name!r}: give either example=(inputs...) or examples=[(inputs...), ...]")
    for one in given:
        if not isinstance(one, list | tuple):
            raise InvalidInput(
                f"tenant {name!r}: an example is of {type(one).__name__}; give a tuple of inputs, (x,) for one"
            )
    return [tuple(one) for one in given]


def priority_of(name: str, priority: int) -> int:
    """Raises InvalidInput: the policy adds and compares them."""
    if not is_whole(priority):
        raise InvalidInput(f"tenant {name!r}: priority is {priority!r}; give a whole number")
    return int(priority)


def allowed_ns(name: str, deadline: float) -> int:
    """From now, 0 or less if it has passed; raises InvalidInput."""
    if not is_finite(deadline):
        raise InvalidInput(f"tenant {name!r}: deadline is {deadline!r}; give seconds from now, a finite number")
    return ns_of(deadline)


def ns_of(seconds: float) -> int:
    """What is very long is as good as for ever."""
    return round(max(-LONG_S, min(LONG_S, float(seconds))) * 1e9)


def is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer)


def is_count(value: Any) -> bool:
    return is_whole(value) and value >= 1


def is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def is_positive(value: Any) -> bool:
    return is_finite(value) and value > 0


def until_s(what: str, timeout: float | None) -> float | None:
    """By the monotonic clock; raises InvalidInput, before anything is done."""
    if timeout is None or timeout == math.inf:
        return None
    if not is_finite(timeout):
        raise InvalidInput(f"{what}: timeout is {timeout!r}; give seconds, or None to wait as long as it takes")
    return time.monotonic() + ns_of(timeout) / 1e9


def left_s(until: float | None) -> float | None:
    """Of a time limit, by the monotonic clock."""
    return None if until is None else max(0.0, until - time.monotonic())
