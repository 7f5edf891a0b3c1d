"""One runtime under several policies, one after the other, so that what was compiled once serves all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from coalesce.runtime.elsewhere import Elsewhere
from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.commands import Command, Dispatch, Want
from coalesce.scheduler.events import CatalogChanged, Completed, Event, Submitted, TenantAdded, TenantRemoved
from coalesce.scheduler.policy import Policy
from coalesce.scheduler.request import Tenant


class Change(NamedTuple):
    """An event of a `Switching` that is elsewhere."""

    make: Callable[[], Policy]


class Switching:
    """A policy that is another one after each `change`, which is told what there is and nothing of the past.

    Bundles are counted on, so that no two have one number. Unless `mixed`, nobody hears that a policy wants an
    executable of several families.
    """

    def __init__(self, make: Callable[[], Policy], mixed: bool = True) -> None:
        self._policy, self._mixed = make(), mixed
        self._next: Callable[[], Policy] | None = None
        self._catalog = Catalog()
        self._tenants: dict[str, Tenant] = {}
        self._before = self._bundles = 0  # of the policies before, and of all
        self._under_way = 0

    def change(self, make: Callable[[], Policy]) -> None:
        """From the next request on; called on any thread, when every request has ended."""
        self._next = make

    def on_event(self, event: Event | Change, now_ns: int) -> Sequence[Command]:
        if isinstance(event, Change):
            self.change(event.make)
            return []
        if self._next is not None and isinstance(event, Submitted):
            self._begin(self._next, now_ns)
        self._remember(event)
        if isinstance(event, Completed):
            self._under_way -= 1
            event = event._replace(bundle=event.bundle - self._before)
        commands = self._policy.on_event(event, now_ns)
        return [self._counted(command) for command in commands if self._mixed or not wants_several(command)]

    def _begin(self, make: Callable[[], Policy], now_ns: int) -> None:
        assert not self._under_way, f"{self._under_way} bundles of the policy before are on the device"
        self._policy, self._next, self._before = make(), None, self._bundles
        for event in (CatalogChanged(self._catalog), *map(TenantAdded, self._tenants.values())):
            commands = self._policy.on_event(event, now_ns)
            assert not commands, f"a policy that has nothing to do wants {commands}"

    def _remember(self, event: Event) -> None:
        if isinstance(event, CatalogChanged):
            self._catalog = event.catalog
        elif isinstance(event, TenantAdded):
            self._tenants[event.tenant.name] = event.tenant
        elif isinstance(event, TenantRemoved):
            self._tenants.pop(event.name, None)

    def _counted(self, command: Command) -> Command:
        if not isinstance(command, Dispatch):
            return command
        self._bundles += 1
        self._under_way += 1
        return command._replace(bundle=command.bundle + self._before)


class SwitchingElsewhere(Elsewhere):
    """The same in a process of its own; policies go there pickled."""

    def __init__(self, make: Callable[[], Policy], mixed: bool = True) -> None:
        super().__init__(partial(Switching, make, mixed))
        self._change: Change | None = None

    def change(self, make: Callable[[], Policy]) -> None:
        self._change = Change(make)

    def on_events(self, events: Sequence[Any], now_ns: int) -> Sequence[Sequence[Command]]:
        change, self._change = self._change, None
        if change is None:
            return super().on_events(events, now_ns)
        return super().on_events([change, *events], now_ns)[1:]


def wants_several(command: Command) -> bool:
    return isinstance(command, Want) and len(command.entries) > 1
