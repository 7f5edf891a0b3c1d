"""Small random serving problems: a few tenants of a few programs, and some dozen requests that mostly do not all fit.

Times are whole microseconds, so that an integer program counts as the simulator does. Runs take what they are expected
to take: what is asked here is what a policy decides, not what it predicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from coalesce.scheduler.bounds import best_rate, Linear, shared_rate
from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.machine import Line, line_catalog
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.workloads import Arrival, arrive, gamma, zipf

US = 1_000
WIDTHS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Instance:
    seed: int
    lines: tuple[Line, ...]  # of each family
    tenants: tuple[Tenant, ...]
    arrivals: tuple[Arrival, ...]
    load: float  # arrivals beside what could be served, for long
    cv: float
    widths: tuple[int, ...] = WIDTHS

    @property
    def catalog(self) -> Catalog:
        return line_catalog(dict(enumerate(self.lines)), self.widths)

    def family(self, arrival: Arrival) -> int:
        return next(tenant.families[0] for tenant in self.tenants if tenant.name == arrival.tenant)

    def deadline_ns(self, arrival: Arrival) -> int:
        return arrival.time_ns + next(tenant.slo_ns for tenant in self.tenants if tenant.name == arrival.tenant)


def random_instance(seed: int, requests: tuple[int, int] = (10, 30)) -> Instance:
    chance = Random(seed)
    families = chance.choice((1, 1, 2, 2, 3))
    lines = tuple(Line(whole(chance, 50, 400), whole(chance, 300, 2000)) for _ in range(families))
    tenants = []
    for i in range(chance.randint(max(2, families), 6)):
        family = i % families
        scale = chance.choice((3.0, 5.0, 5.0, 8.0, 12.0))
        slo_ns = round(scale * lines[family].time(1) / US) * US
        tenants.append(Tenant(f"t{i}", (family,), slo_ns))
    shares = zipf(len(tenants), chance.choice((0.0, 1.0)))
    load, cv = chance.choice((0.4, 0.7, 1.0, 1.3, 2.0)), chance.choice((0.5, 1.0, 2.0, 4.0))
    rate = load * capacity(lines, tenants, shares)
    count = chance.randint(*requests)
    drawn = arrive(chance, gamma(chance, rate, cv), [tenant.name for tenant in tenants], 1 << 60, shares)
    first = [next(drawn) for _ in range(count)]
    arrivals = [Arrival((a.time_ns - first[0].time_ns) // US * US, a.tenant) for a in first]
    return Instance(seed, lines, tuple(tenants), tuple(arrivals), load, cv)


def whole(chance: Random, low: int, high: int) -> int:
    """Nanoseconds of so many times ten microseconds."""
    return chance.randint(low // 10, high // 10) * 10 * US


def capacity(lines: tuple[Line, ...], tenants: list[Tenant], shares: list[float]) -> float:
    """Requests a second of this mix that could be served for long, if each ran in the best batch of its kind."""
    rates = [best_rate(Linear(*lines[t.families[0]]).times(WIDTHS), t.slo_ns) for t in tenants]
    return shared_rate(shares, rates)
