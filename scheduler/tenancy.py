"""The tenants that are registered, and the longest bundle that none of them is blocked by past rescue."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coalesce.scheduler.costs import FAR
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.shares import Account

BRIEF_NS = 2_000_000


class Tenancy:
    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}  # by name
        self._tightest: dict[int, int] = {}
        self._patient: set[str] = set()  # who has more than BRIEF_NS
        self.is_brief = True  # no SLO is long enough to tell a refusal at once from one when it is over

    def get(self, name: str) -> Account | None:
        return self.accounts.get(name)

    def add(self, tenant: Tenant) -> bool:
        """Takes the place of one of its name, whose requests stay. Whether the least SLO of a family has changed."""
        known = self.accounts.get(tenant.name)
        before = {family: self._tightest.get(family) for family in tenant.families}
        loosened = False
        if known is None:
            self.accounts[tenant.name] = Account(tenant)
        else:
            gone = known.tenant
            known.change(tenant)
            known.leaving = False
            loosened = self._loosen(gone)
        self._patient.discard(tenant.name)
        if tenant.slo_ns > BRIEF_NS:
            self._patient.add(tenant.name)
        self.is_brief = not self._patient
        for family in tenant.families:
            self._tightest[family] = min(tenant.slo_ns, self._tightest.get(family, FAR))
        return loosened or any(self._tightest[family] != least for family, least in before.items())

    def leave(self, account: Account) -> bool:
        """Whether the least SLO of a family has changed."""
        account.leaving = True
        self.forget_if_done(account)
        return self._loosen(account.tenant)

    def _loosen(self, gone: Tenant) -> bool:
        """Finds the least SLO of its families anew, where it was its own; whether it was."""
        was = [family for family in gone.families if self._tightest.get(family) == gone.slo_ns]
        for family in was:
            present = (a.tenant for a in self.accounts.values() if not a.leaving)
            left = [tenant.slo_ns for tenant in present if family in tenant.families]
            if left:
                self._tightest[family] = min(left)
            else:
                del self._tightest[family]
        return bool(was)

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
