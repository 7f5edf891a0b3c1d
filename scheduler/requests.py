"""The requests that have not ended, on their way: taken on, waiting, stopped, moved on, run again.

    submit      refused at once, or a lane that waits at its family's first segment
    drop        what could not be in time any more
    cancel      what waits ends now; what is on the device, when its bundle is done
    complete    the last segment: it has ended.  Another one: it waits at the next.  Failed: again, in halves
    move        its tenant was put into quarantine or let out of it: it waits elsewhere

Commands that say what became of requests are left in `out`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from coalesce.scheduler.admission import Admission
from coalesce.scheduler.commands import Command, Reason, Reject
from coalesce.scheduler.costs import Costs, Place
from coalesce.scheduler.flight import Bundle
from coalesce.scheduler.lanes import Lane
from coalesce.scheduler.laying import Start
from coalesce.scheduler.load import Load
from coalesce.scheduler.promises import Promises
from coalesce.scheduler.quarantine import Watch
from coalesce.scheduler.queues import Queues
from coalesce.scheduler.request import Request
from coalesce.scheduler.shares import Account, Shares
from coalesce.scheduler.slots import Slots
from coalesce.scheduler.tenancy import Tenancy
from coalesce.scheduler.tuples import made

LEVELS = 16  # priorities that are remembered, with how often each is asked for; those in use always are


class Requests:
    def __init__(
        self,
        queues: Queues,
        slots: Slots,
        tenancy: Tenancy,
        watch: Watch,
        shares: Shares,
        costs: Costs,
        load: Load,
        promises: Promises,
    ) -> None:
        self.out: list[Command] = []
        self.closed = False
        self._queues, self._tenancy, self._watch = queues, tenancy, watch
        self._accounts, self._slots = tenancy.accounts, slots
        self._shares, self._costs, self._promises = shares, costs, promises
        self._admission = Admission(tenancy, watch, shares, load, promises)
        self.lanes: dict[int, Lane] = {}  # by request
        self._most_levels = LEVELS
        self._ended = 0  # since those that nobody has any more were forgotten last

    def submit(self, requests: Iterable[Request], start: Start, now_ns: int) -> None:
        """`start` is when the device can begin with them."""
        queues, watch, admission, lanes = self._queues, self._watch, self._admission, self.lanes
        for request in requests:
            number, name, family, _, _, priority = request
            account = self._accounts.get(name)
            if self.closed or account is None or account.leaving:
                self.out.append(Reject(number, self._why_closed(account)))
                continue
            lot = watch.lot(name) if watch.standings else 0
            queue = queues.first(family, lot, account.priority + priority)
            excess = self._shares.excess(account, now_ns)
            queue.note_arrival(now_ns, excess)
            refused = admission.admit(request, account, queue, excess, start, now_ns)
            if refused is None:
                lanes[number] = queues.add(request, account, queue, now_ns, admission.foreseen)
                continue
            self.out.append(made(Reject, (number, refused)))
            if lot:
                queues.discard(queue)
                watch.hope(name, now_ns)

    def _why_closed(self, account: Account | None) -> Reason:
        if self.closed:
            return Reason.SHUTDOWN
        return Reason.UNKNOWN_TENANT if account is None else Reason.TENANT_CLOSED

    def cancel(self, request: int) -> None:
        lane = self.lanes.get(request)
        if lane is not None:
            self.stop(lane, Reason.CANCELLED)

    def stop(self, lane: Lane, reason: Reason) -> None:
        """Ends what waits now, and what is on the device after its bundle."""
        if lane.queue is None:
            lane.ending = lane.ending or reason
            return
        self._queues.drop(lane)
        self._reject(lane, reason)

    def drop_hopeless(self, start_ns: int, now_ns: int) -> None:
        """Ends the heads that would be late even if they ran next, and ran no longer than they mostly do."""
        first: Lane | None = None  # who comes with it has the same reason
        for level in list(self._queues.waiting):
            while (lane := level.first_hopeless(start_ns)) is not None:
                if first is None and lane.queue is not None:
                    first = lane
                    self._promises.note(lane, start_ns + lane.queue.costs.alone.l50_ns)
                expired = lane.request.deadline_ns <= now_ns
                self.stop(lane, Reason.EXPIRED if expired else Reason.INFEASIBLE)

    def stop_all(self, reason: Reason, account: Account | None = None) -> None:
        """Of one tenant, or of all."""
        for lane in list(self.lanes.values()):
            if account is None or lane.account is account:
                self.stop(lane, reason)

    def complete(self, bundle: Bundle, failed: bool, now_ns: int) -> None:
        for place, lanes in bundle.parts:
            if not failed:
                self._advance(place, lanes)
            elif bundle.lanes == 1:
                self._fail(lanes, now_ns)
            else:
                self._halve(place, lanes)

    def _advance(self, place: Place, lanes: list[Lane]) -> None:
        family, segment = place
        if segment + 1 == self._costs.catalog.segments_of(family):
            self._end(lanes)
            return
        after: list[Lane] = []
        for lane in lanes:
            if lane.ending is not None:
                self._reject(lane, lane.ending)
            else:
                lane.again = False
                after.append(lane)
        queues, place = self._queues, (family, segment + 1)
        if after and len(queues.levels) == 1 and not self._watch.standings:
            queues.put_all(after, queues.find(place, 0, after[0].level))
            return
        for lane in after:
            self._enqueue(lane, place, self._watch.lot(lane.request.tenant))

    def _fail(self, lanes: list[Lane], now_ns: int) -> None:
        """What fails alone has failed."""
        for lane in lanes:
            self._reject(lane, lane.ending or Reason.FAILED)
            if lane.ending is None and lane.request.tenant in self._accounts:  # it may have gone with it
                self.out += self._watch.fail(lane.request.tenant, now_ns)

    def _halve(self, place: Place, lanes: list[Lane]) -> None:
        """Each half runs by itself, until those that fail are alone; who has been put apart meanwhile is so here."""
        groups: dict[str | None, list[Lane]] = {}
        for lane in lanes:
            name = lane.request.tenant
            if lane.ending is not None:
                self._reject(lane, lane.ending)
            else:
                groups.setdefault(name if self._watch.lot(name) else None, []).append(lane)
        for group in groups.values():
            middle = (len(group) + 1) // 2
            for half in group[:middle], group[middle:]:
                lot = self._watch.new_lot()
                for lane in half:
                    lane.again = True
                    self._enqueue(lane, place, lot)

    def move(self, tenants: Sequence[str]) -> None:
        """Takes lanes that wait to where their tenants now belong; those that are to run again stay apart."""
        if not tenants:
            return
        moved = set(tenants)
        apart: dict[tuple[int, str], int] = {}
        for lane in list(self.lanes.values()):
            name = lane.request.tenant
            if lane.queue is None or name not in moved:
                continue
            lot = self._watch.lot(name)
            if lane.again:
                key = (lane.queue.lot, name)
                lot = apart[key] if key in apart else apart.setdefault(key, self._watch.new_lot())
            self._queues.move(lane, self._queues.find(lane.queue.place, lot, lane.level))

    def _enqueue(self, lane: Lane, place: Place, lot: int) -> None:
        self._queues.put(lane, self._queues.find(place, lot, lane.level))

    def _reject(self, lane: Lane, reason: Reason) -> None:
        self.out.append(Reject(lane.request.id, reason))
        self._end((lane,))

    def _end(self, lanes: Sequence[Lane]) -> None:
        """Of one family."""
        alive, begun = self.lanes, 0
        for lane in lanes:
            account = lane.account
            account.pending -= 1
            begun += lane.begun
            del alive[lane.request.id]
            if lane.charge_ns:
                lane.level.release(lane.bucket, lane.charge_ns)
            if account.leaving and self._tenancy.forget_if_done(account):
                self._watch.forget(account.tenant.name)
        if begun:
            self._slots.release(lanes[0].request.family, begun)
        if len(self._queues.levels) > LEVELS:
            self._look_at_levels(len(lanes))

    def _look_at_levels(self, ended: int) -> None:
        """When they have become twice as many, or many requests have ended: it takes as long as there are of both."""
        self._ended += ended
        count = len(self._queues.levels)
        if count <= self._most_levels and 2 * self._ended <= count + len(self.lanes):
            return
        self._queues.keep_levels({own.level.priority for own in self.lanes.values()})
        self._most_levels, self._ended = max(LEVELS, 2 * len(self._queues.levels)), 0
