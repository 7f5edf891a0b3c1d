"""Doubts of what the host is believed to add, where that rules out what comes to an idle device.

They are as those of predictions (`doubt`): for a request that would be in time without, with which nobody came who is
in time with it, and as seldom. What was learnt of the host is then learnt anew, from the next few bundles, each for
what comes to the device while it is idle; what comes meanwhile is judged as before. So a host that was slow for a while
costs no more than that while, LONGEST_NS or SELDOM runs, and a few bundles; of one that stays slow as few are late.
"""

from __future__ import annotations

from collections.abc import Sequence

from coalesce.scheduler.costs import Costs
from coalesce.scheduler.doubt import Pauses
from coalesce.scheduler.lag import Lag
from coalesce.scheduler.request import Request
from coalesce.scheduler.tenancy import Tenancy


class Trial:
    def __init__(self, costs: Costs, tenancy: Tenancy, lag: Lag) -> None:
        self._costs, self._tenancy, self._lag = costs, tenancy, lag
        self._pauses = Pauses()

    def arise(self, requests: Sequence[Request], now_ns: int) -> bool:
        """These come to an idle device; whether what is decided about them now is as if the host added nothing."""
        lag = self._lag
        added_ns, found_ns = lag.ready_ns - now_ns + lag.results_ns, 0
        for request in requests if added_ns else ():
            account, left_ns = self._tenancy.get(request.tenant), request.deadline_ns - now_ns
            if account is None or account.leaving or account.tenant.quota <= 0:
                continue
            run_ns = self._costs.of((request.family, 0)).alone.l50_ns
            if run_ns + added_ns <= left_ns:
                return False
            if run_ns <= left_ns and not found_ns:
                found_ns = run_ns
        if not found_ns:
            return False
        if not lag.trials:
            if not self._pauses.is_due(found_ns, now_ns):
                return False
            lag.forget()
        lag.begin_trial()
        return True
