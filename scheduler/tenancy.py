"""The tenants that are registered, and the longest bundle that none of them is blocked by past rescue."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coalesce.scheduler.costs import FAR
from coalesce.scheduler.request import Tenant
from coalesce.scheduler.shares import Account


class Tenancy:
    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._tightest: dict[int, int] | None = None

    def get(self, name: str) -> Account | None:
        return self._accounts.get(name)

    def add(self, tenant: Tenant) -> None:
        """Takes the place of one of its name, whose requests stay."""
        self._tightest = None
        known = self._accounts.get(tenant.name)
        if known is None:
            self._accounts[tenant.name] = Account(tenant)
            return
        known.tenant = tenant
        known.leaving = False

    def leave(self, account: Account) -> None:
        self._tightest = None
        account.leaving = True
        self.forget_if_done(account)

    def forget_if_done(self, account: Account) -> bool:
        if not account.leaving or account.pending or self._accounts.get(account.tenant.name) is not account:
            return False
        del self._accounts[account.tenant.name]
        return True

    @property
    def tightest_ns(self) -> Mapping[int, int]:
        """The least SLO of each family."""
        if self._tightest is None:
            self._tightest = {}
            for account in self._accounts.values():
                for family in () if account.leaving else account.tenant.families:
                    self._tightest[family] = min(account.tenant.slo_ns, self._tightest.get(family, FAR))
        return self._tightest

    def cap(self, alone_ns: Callable[[int], int]) -> int:
        """The least time that a tenant has left beside its own run; one with a shorter SLO does not count."""
        left = (slo_ns - alone_ns(family) for family, slo_ns in self.tightest_ns.items())
        return min((ns for ns in left if ns > 0), default=FAR)
