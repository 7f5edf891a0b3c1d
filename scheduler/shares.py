"""Who has had how much of the device: so that whoever asks for more than its share cannot take it from others.

A tenant's share is its weight among those that asked for anything lately. What it used is device time that it was
admitted with, halved every EPOCH. Over its share, and while others are refused, a tenant is admitted only where those
others keep the places that they will need (`hopes`). How far over its share that is depends on how many of them are
refused, and on how much a tenant's use may differ by chance. Nothing is idle for it, since the device works on what
waits, whoever sent it.
"""

from __future__ import annotations

from math import sqrt

from coalesce.scheduler.request import Tenant

EPOCH = 27  # bits of a time that do not matter: 134 ms
CLOSE = 1.08  # equal tenants differ by chance
FADES = 0.8  # of what is known of refusals, every EPOCH
MISS = 0.005  # share of refusals at which twice the share is too much
CHANCE = 2  # standard deviations


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
        self._asked = self._missed = 0.0  # by those that are not over their shares; and of these, refused

    def excess(self, account: Account, now_ns: int) -> float:
        """What it has had, in times of its share; asking makes it one of those that share."""
        epoch = now_ns >> EPOCH
        if epoch != self._epoch:
            self._begin(epoch)
        if account.epoch != epoch:
            account.used_ns >>= min(63, epoch - account.epoch)
            account.epoch = epoch
            self._weights += account.tenant.weight
        weights = max(self._weights, self._weights_before)
        return account.used_ns * weights / (self._used_ns * account.tenant.weight) if self._used_ns else 0.0

    def note(self, missed: bool) -> None:
        """Somebody asked who is not over its share, and was refused or not."""
        self._asked += 1
        self._missed += missed

    def is_careful(self, account: Account, excess: float, lane_ns: int) -> bool:
        """Whether it has had so much that it must leave places for others; `lane_ns` is what a request counts."""
        if not self._missed or not account.used_ns:
            return False
        return excess > 1 + MISS * self._asked / self._missed + CHANCE * sqrt(lane_ns * excess / account.used_ns)

    def charge(self, account: Account, work_ns: int) -> None:
        account.used_ns += work_ns
        self._used_ns += work_ns

    def worth(self, account: Account) -> float:
        """Of one lane, where not everybody can be served: twice the weight for whom the device owes something."""
        weights = max(self._weights, self._weights_before)
        owed = account.used_ns * weights < self._used_ns * account.tenant.weight
        return 2 * account.tenant.weight if owed else account.tenant.weight

    def _begin(self, epoch: int) -> None:
        passed = min(63, epoch - self._epoch)
        self._used_ns >>= passed
        self._asked *= FADES**passed
        self._missed *= FADES**passed
        self._weights_before = self._weights if epoch == self._epoch + 1 else 0.0
        self._weights = 0.0
        self._epoch = epoch
