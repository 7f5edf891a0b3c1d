"""Who has had how much of the device: so that whoever asks for more than its share cannot take it from others.

A tenant's share is its weight among those that asked for anything lately. What it used is device time that it was
admitted with, halved every EPOCH; what it lacks of its share is its deficit, as in deficit round robin, but that it
fades: nobody is owed for a time in which he asked for nothing.

Over its share, or over some more while there is enough for everybody (`admission`), and while others are refused, a
tenant is admitted only where those others keep the places that they will need (`hopes`). How far over its share that is
depends on how many of them are refused, and on how much a tenant's use may differ by chance: the more the more unevenly
tenants ask, or those whose requests come in bursts would be refused for nothing. Nothing is idle for it, since the
device works on what waits, whoever sent it.
"""

from __future__ import annotations

from math import sqrt

from coalesce.scheduler.request import Tenant

EPOCH = 27  # bits of a time that do not matter: 134 ms
WINDOW = 25  # the same, of those in which bursts show: 34 ms
UNEVEN, SEEN = 4.0, 16.0  # how unevenly tenants ask until that is known, as of so many requests
CLOSE = 1.08  # equal tenants differ by chance
FADES = 0.8  # of what is known of refusals, every EPOCH
MISS = 0.005  # share of refusals at which twice the share is too much
CHANCE = 2  # standard deviations


class Account:
    """A tenant, and what it holds."""

    __slots__ = (
        "tenant",
        "priority",
        "quota",
        "weight",
        "leaving",
        "waiting",
        "pending",
        "used_ns",
        "epoch",
        "window",
        "asked",
        "asked_before",
    )

    def __init__(self, tenant: Tenant):
        self.change(tenant)
        self.leaving = False  # removed, and what it had submitted is still to end
        self.waiting = 0  # requests that have not begun
        self.pending = 0  # requests that have not ended
        self.used_ns = 0
        self.epoch = -2  # in which it was last seen
        self.window = -1  # in which it last asked
        self.asked = 0  # for so much
        self.asked_before: int | None = None  # in the one before it

    def change(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.priority, self.quota, self.weight = tenant.priority, tenant.quota, tenant.weight


class Shares:
    def __init__(self) -> None:
        self._epoch = -1
        self._used_ns = 0  # by all tenants
        self._weights = 0.0  # of those that asked in this epoch
        self._weights_before = 0.0  # in the one before it
        self._sharing = 0.0  # the larger of both
        self._asked = self._missed = 0.0  # by those that are not over their shares; and of these, refused
        self._varied = self._compared = 0.0  # see `_look_at`

    def excess(self, account: Account, now_ns: int) -> float:
        """What it has had, in times of its share; asking makes it one of those that share."""
        window = now_ns >> WINDOW
        if account.window != window:
            self._look_at(account, window)
        account.asked += 1
        used_ns = self._used_ns
        return account.used_ns * self._sharing / (used_ns * account.weight) if used_ns else 0.0

    def note_refusal(self) -> None:
        """Of somebody who is not over its share."""
        self._asked += 1
        self._missed += 1

    def is_careful(self, account: Account, excess: float, lane_ns: int) -> bool:
        """Whether it has had so much that it must leave places for others; `lane_ns` is what a request counts."""
        if not self._missed or not account.used_ns:
            return False
        uneven = max(1.0, (self._varied + UNEVEN * SEEN) / (self._compared + SEEN))
        chance = CHANCE * sqrt(uneven * lane_ns * excess / account.used_ns)
        return excess > 1 + MISS * self._asked / self._missed + chance

    def charge(self, account: Account, work_ns: int, over: bool) -> None:
        """One is taken on, over its share or not."""
        account.used_ns += work_ns
        self._used_ns += work_ns
        if not over:
            self._asked += 1

    def worth(self, account: Account) -> float:
        """Of one lane, where not everybody can be served: twice the weight for whom the device owes something."""
        owed = account.used_ns * self._sharing < self._used_ns * account.weight
        return 2 * account.weight if owed else account.weight

    def _look_at(self, account: Account, window: int) -> None:
        """It asks for the first time in a window. By how much it asked more or less than in the one before: squared
        that is what it asked in both together, if requests come one by one, and so many times as much if they come in
        bursts of so many."""
        epoch = window >> EPOCH - WINDOW
        if epoch != self._epoch:
            self._begin(epoch)
        if account.epoch != epoch:
            account.used_ns >>= min(63, epoch - account.epoch)
            account.epoch = epoch
            self._weights += account.weight
            self._sharing = max(self._weights, self._weights_before)
        asked, before, last = account.asked, account.asked_before, account.window
        if before is not None:
            self._varied += (asked - before) * (asked - before)
            self._compared += asked + before
        account.asked_before = asked if window == last + 1 and last >= 0 else 0 if last >= 0 else None
        account.window, account.asked = window, 0

    def _begin(self, epoch: int) -> None:
        passed = min(63, epoch - self._epoch)
        self._used_ns >>= passed
        self._varied *= FADES**passed
        self._compared *= FADES**passed
        self._asked *= FADES**passed
        self._missed *= FADES**passed
        self._weights_before = self._weights if epoch == self._epoch + 1 else 0.0
        self._weights, self._sharing = 0.0, self._weights_before
        self._epoch = epoch
