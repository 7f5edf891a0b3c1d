"""What goes wrong in a simulation, and when: a plan, so that it goes wrong again with the same seed.

Times are of the simulation's clock; `until_ns` is the first moment at which it is right again.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

FAR = 1 << 62


class Slow(NamedTuple):
    """Bundles with a lane of this tenant take `factor` times as long; all bundles where it is None."""

    factor: float
    tenant: str | None = None
    from_ns: int = 0
    until_ns: int = FAR


class Raises(NamedTuple):
    """Bundles with such a lane fail: a request of this tenant, with a chance of `share` for each request."""

    tenant: str
    share: float = 1.0
    from_ns: int = 0
    until_ns: int = FAR


class Stall(NamedTuple):
    """Nothing that runs then, or begins, completes before `until_ns`."""

    from_ns: int
    until_ns: int


@dataclass(frozen=True)
class Faults:
    slow: tuple[Slow, ...] = ()
    raising: tuple[Raises, ...] = ()
    stalls: tuple[Stall, ...] = ()

    def factor(self, tenants: frozenset[str], start_ns: int) -> float:
        """How much longer a bundle of these takes."""
        factor = 1.0
        for slow in self.slow:
            if slow.from_ns <= start_ns < slow.until_ns and (slow.tenant is None or slow.tenant in tenants):
                factor *= slow.factor
        return factor

    def end(self, start_ns: int, end_ns: int) -> int:
        """When a bundle ends that would have run from start to end."""
        for stall in self.stalls:
            if start_ns < stall.until_ns and end_ns > stall.from_ns:
                end_ns = max(end_ns, stall.until_ns)
        return end_ns

    def fails(self, tenant: str, request: int, start_ns: int) -> bool:
        """Always the same for one request, in whatever company it runs."""
        return any(
            fault.tenant == tenant
            and fault.from_ns <= start_ns < fault.until_ns
            and (fault.share >= 1 or Random(request).random() < fault.share)
            for fault in self.raising
        )
