"""What a peer of Coalesce is: a way to serve a round of n tenants, with every configuration of it that is worth trying.

Each experiments/peers_* file holds the peers of one machinery; experiments/pairs.py measures them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from coalesce.models import Model
from experiments.methods import Candidate, Method, Options, Tenants


class CannotRun(Exception):
    """Says why a peer, or one configuration of it, does not run here."""


@dataclass(frozen=True)
class Cell:
    """Tenants of one model, and what their peers need to know."""

    model: Model
    fields: dict[str, Any]  # of the network, other than as published
    dtype: str
    batch: int
    precision: str | None  # jax_default_matmul_precision
    tenants: Tenants
    options: list[Options]  # XLA's, worth trying
    until_end: ExitStack  # closed when the peer's pair is measured: processes end with it
    autotune: bool = False  # whether PyTorch is also compiled in the mode that takes minutes

    @property
    def count(self) -> int:
        return self.tenants.count


@dataclass(frozen=True)
class OneTenant:
    """What a process of its own, experiments/peers_worker.py, is told of the tenant that it serves; as JSON."""

    model: str
    fields: dict[str, Any]
    dtype: str
    tenant: int  # as experiments/cells.py draws it
    engine: str  # jax or torch
    batch: int = 1
    options: Options = field(default_factory=dict)
    precision: str | None = None
    autotune: bool = False
    form: list[Any] = field(default_factory=list)  # of PyTorch's weights and compiler; none: the quickest is looked for


@dataclass(frozen=True)
class Burst:
    """A candidate one call of which is several rounds in a row; requests time themselves."""

    candidate: Candidate
    rounds: int
    latencies: list[float] = field(default_factory=list)  # seconds, of each request


Build = Callable[[], Iterator[Candidate | Burst]]
Configurations = Iterable[tuple[Options, Build]]  # built one after the other; one that fails does not stop the next


@dataclass(frozen=True)
class Peer:
    """`configurations` may raise CannotRun for all of them. `most`: left out with more tenants than that."""

    kind: str
    configurations: Callable[[Cell], Configurations]
    most: int | None = None
    because: str = ""


def with_options(method: Method[Tenants], cell: Cell, **also: Any) -> Configurations:
    """A method of experiments/methods.py with each set of XLA's options."""
    for options in cell.options:
        yield {**options, **also}, lambda options=options: method(cell.tenants, {**options, **also})
