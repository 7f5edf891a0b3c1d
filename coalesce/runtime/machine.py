"""The device, as the driver sees it: executables by their number, the banks that they read, bundles on their way;
and who makes executables for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from coalesce.runtime.ticket import Ticket
from coalesce.scheduler.commands import Want
from coalesce.scheduler.events import Event


class Spoilt(NamedTuple):
    """In place of a result: what raised when it was put into its tenant's own pytree."""

    error: Exception


def as_exception(raised: BaseException) -> Exception:
    """What a tenant's own code has raised, as what may end its request and nothing else."""
    if isinstance(raised, Exception):
        return raised
    return RuntimeError(f"{type(raised).__name__}: {raised}")


@runtime_checkable
class Launched(Protocol):
    """A bundle on its way."""

    def wait(self) -> None:
        """Until the device is done; raises what went wrong there."""
        ...

    def is_at_hand(self, within_s: float) -> bool:
        """Whether `wait` and `results` return at once, and run no code of a tenant; looks again for so long."""
        ...

    def results(self) -> Sequence[Sequence[Any] | None]:
        """For each entry the result of each of its lanes, or a `Spoilt`; None for a segment that is not the last."""
        ...


@runtime_checkable
class Machine(Protocol):
    """Called by the driver's thread."""

    @property
    def copies(self) -> bool:
        """Whether what requests bring is copied on its way to it, for which the host takes a while."""
        ...

    def launch(self, executable: int, entries: Sequence[Sequence[Ticket]]) -> Launched:
        """Dispatch a bundle: for each entry of the executable, its lanes."""
        ...

    def release(self, tickets: Sequence[Ticket]) -> None:
        """What requests that end between two segments held on the device."""
        ...


@runtime_checkable
class Maker(Protocol):
    """Who makes executables, as the driver sees it; called on the driver's thread."""

    def give_up(self, why: Exception) -> None:
        """The device is gone; called on any thread."""
        ...

    def want(self, want: Want) -> None: ...

    def exhausted(self, executable: int, error: Exception) -> Sequence[Event]:
        """There was no memory to run it."""
        ...
