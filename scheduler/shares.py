"""Who has had how much of the device: so that whoever asks for more than its share cannot take it from others.

A tenant's share is its weight among those that asked for anything lately. What it used is device time that it was
admitted with, halved every EPOCH. Over its share, and once somebody else was refused lately, a tenant is admitted only
where a quarter of the time up to its deadline stays free: that quarter is for those below theirs, whenever they come.
Nothing is idle for it, since the device works on what waits, whoever sent it.
"""

from __future__ import annotations

from coalesce.scheduler.request import Tenant

FAR = 1 << 62
SCARCE_NS = 1_000_000_000
EPOCH = 27  # bits of a time that do not matter: 134 ms
TOLERANCE = 1.08  # equal tenants differ by chance


class Account:
    """A tenant, and what it holds."""

    __slots__ = ("tenant", "leaving", "waiting", "pending", "used_ns", "epoch")

    def __init__(self, tenant: Tenant):
        self.tenant = tenant
        self.leaving = False  # removed, and what it had submitted is still to end
        self.waiting = 0  # requests that have not begun
        self.pending = 0  # requests that have not ended
        self.used_ns = 0
        self.epoch = -2  # in which it was last seen


class Shares:
    def __init__(self) -> None:
        self._epoch = -1
        self._used_ns = 0  # by all tenants
        self._weights = 0.0  # of those that asked in this epoch
        self._weights_before = 0.0  # in the one before it
        self._scarce_ns = -FAR  # when somebody was last refused who was not over its share

    def is_over(self, account: Account, now_ns: int) -> bool:
        """Whether it has had more than its share; asking makes it one of those that share."""
        epoch = now_ns >> EPOCH
        if epoch != self._epoch:
            self._begin(epoch)
        if account.epoch != epoch:
            account.used_ns >>= min(63, epoch - account.epoch)
            account.epoch = epoch
            self._weights += account.tenant.weight
        weights = max(self._weights, self._weights_before)
        return account.used_ns * weights > self._used_ns * account.tenant.weight * TOLERANCE

    def miss(self, now_ns: int) -> None:
        """Somebody was refused who is not over its share."""
        self._scarce_ns = now_ns

    def are_scarce(self, now_ns: int) -> bool:
        return now_ns - self._scarce_ns < SCARCE_NS

    def charge(self, account: Account, work_ns: int) -> None:
        account.used_ns += work_ns
        self._used_ns += work_ns

    def worth(self, account: Account) -> float:
        """Of one lane, where not everybody can be served: twice the weight for whom the device owes something."""
        weights = max(self._weights, self._weights_before)
        owed = account.used_ns * weights < self._used_ns * account.tenant.weight
        return 2 * account.tenant.weight if owed else account.tenant.weight

    def _begin(self, epoch: int) -> None:
        self._used_ns >>= min(63, epoch - self._epoch)
        self._weights_before = self._weights if epoch == self._epoch + 1 else 0.0
        self._weights = 0.0
        self._epoch = epoch
