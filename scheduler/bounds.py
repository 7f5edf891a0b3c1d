"""What no scheduler can beat: rates in requests a second, from what runs take.

    best_rate        one device: as many lanes a run as can be in time, one run after another
    staggered_rate   n devices whose runs begin one after another, so that a request waits for 1/n of a run at most
    shared_rate      a device that is shared by kinds of requests which cannot share runs
    unfused_rate     K tenants with a run each in turn, of alpha a lane and beta a run
    fused_rate       the same tenants in one run

The first three hold for every policy, even one that knows what will come. The last two are of a policy that must serve
whoever comes whenever: a request has just missed a run of its kind and waits for its turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

SECOND = 1_000_000_000

Times = Mapping[int, int]  # lanes of a run -> nanoseconds that it takes


class Linear(NamedTuple):
    """A run of b lanes takes alpha * b + beta."""

    alpha_ns: int
    beta_ns: int

    def times(self, widths: Iterable[int]) -> Times:
        return {width: self.alpha_ns * width + self.beta_ns for width in widths}


def best_rate(times: Times, slo_ns: int) -> float:
    """max{b / l(b): l(b) <= SLO}; 0 where no run is in time."""
    return max((SECOND * b / ns for b, ns in times.items() if ns <= slo_ns), default=0.0)


def staggered_rate(times: Times, slo_ns: int, devices: int) -> float:
    """Of all n devices, max{n b / l(b): l(b) (1 + 1/n) < SLO}."""
    in_time = (SECOND * b / ns for b, ns in times.items() if ns * (devices + 1) < slo_ns * devices)
    return devices * max(in_time, default=0.0)


def shared_rate(shares: Iterable[float], rates: Iterable[float]) -> float:
    """Of all kinds together: each asks for its share of the requests, and could be served at its rate alone."""
    busy = 0.0  # seconds for one request of the mix
    for share, rate in zip(shares, rates, strict=True):
        if share and not rate:
            return 0.0
        busy += share / rate if share else 0.0
    return 1 / busy if busy else 0.0


def unfused_rate(times: Linear, tenants: int, slo_ns: int) -> float:
    """alpha R <= 1 - (K + 1) beta / SLO."""
    return rate_of(times.alpha_ns, 1 - (tenants + 1) * times.beta_ns / slo_ns)


def fused_rate(times: Linear, slo_ns: int) -> float:
    """alpha R <= 1 - 2 beta / SLO, with the beta of the fused run."""
    return rate_of(times.alpha_ns, 1 - 2 * times.beta_ns / slo_ns)


def rate_of(alpha_ns: int, load: float) -> float:
    return max(0.0, load) * SECOND / alpha_ns
