"""What every policy is: a function of what happened, and when, to what is to be done.

It keeps what it was told, and reads no clock: equal events at equal times give equal commands, whoever asks.

A bundle is dispatched before the one on the device ends, so that the device does not wait for the host: with `depth` 2
one may run while the next one waits behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import Event


@runtime_checkable
class Policy(Protocol):
    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        """Commands, to be carried out in their order; `now_ns` never goes back."""
        ...
