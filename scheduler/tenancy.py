"""The tenants that are registered, and the longest bundle that none of them is blocked by past rescue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from coalesce.scheduler.costs import FAR
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.shares import Account

BRIEF_NS = 2_000_000


class Tenancy:
    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}  # by name
        self._tightest: dict[int, int] = {}
        self._slos: dict[int, dict[int, int]] = {}  # of each family, how many tenants have which
        self._patient: set[str] = set()  # who has more than BRIEF_NS
        self.is_brief = True  # no SLO is long enough to tell a refusal at once from one when it is over

    def get(self, name: str) -> Account | None:
        return self.accounts.get(name)

    def add(self, tenant: Tenant) -> bool:
        """Takes the place of one of its name, whose requests stay. Whether the least SLO of a family has changed."""
        known = self.accounts.get(tenant.name)
        gone = () if known is None or known.leaving else (known.tenant,)
        if known is None:
            self.accounts[tenant.name] = Account(tenant)
        else:
            known.change(tenant)
            known.leaving = False
        self._patient.discard(tenant.name)
        if tenant.slo_ns > BRIEF_NS:
            self._patient.add(tenant.name)
        self.is_brief = not self._patient
        return self._recount((tenant,), gone)

    def leave(self, account: Account) -> bool:
        """Whether the least SLO of a family has changed."""
        gone = () if account.leaving else (account.tenant,)
        account.leaving = True
        self.forget_if_done(account)
        return self._recount((), gone)

    def _recount(self, come: Sequence[Tenant], gone: Sequence[Tenant]) -> bool:
        counts = [(family, own.slo_ns, 1) for own in come for family in own.families]
        counts += [(family, own.slo_ns, -1) for own in gone for family in own.families]
        before = {family: self._tightest.get(family) for family, _, _ in counts}
        for count in counts:
            self._count(*count)
        return any(self._tightest.get(family) != least for family, least in before.items())

    def _count(self, family: int, slo_ns: int, more: int) -> None:
        slos = self._slos.setdefault(family, {})
        slos[slo_ns] = slos.get(slo_ns, 0) + more
        if slos[slo_ns]:
            self._tightest[family] = min(slo_ns, self._tightest.get(family, FAR))
            return
        del slos[slo_ns]
        if not slos:
            del self._slos[family], self._tightest[family]
        elif self._tightest[family] == slo_ns:
            self._tightest[family] = min(slos)

    def forget_if_done(self, account: Account) -> bool:
        if not account.leaving or account.pending or self.accounts.get(account.tenant.name) is not account:
            return False
        del self.accounts[account.tenant.name]
        self._patient.discard(account.tenant.name)
        self.is_brief = not self._patient
        return True

    @property
    def tightest_ns(self) -> Mapping[int, int]:
        """The least SLO of each family."""
        return self._tightest

    def cap(self, alone_ns: Callable[[int], int]) -> int:
        """The least time that a tenant has left beside its own run; one with a shorter SLO does not count."""
        left = (slo_ns - alone_ns(family) for family, slo_ns in self.tightest_ns.items())
        return min((ns for ns in left if ns > 0), default=FAR)
