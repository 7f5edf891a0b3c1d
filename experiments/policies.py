"""The policies that experiments compare, by name; each is made anew for every run."""

from __future__ import annotations

from collections.abc import Callable

from coalesce.scheduler.baselines.clockwork import Clockwork
from coalesce.scheduler.baselines.edf import Edf
from coalesce.scheduler.baselines.fifo import Fifo
from coalesce.scheduler.baselines.packing import Packing
from coalesce.scheduler.baselines.symphony import Symphony
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.policy import Policy

POLICIES: dict[str, Callable[[], Policy]] = {
    "coalescing": Coalescing,
    "fifo": Fifo,
    "edf": Edf,
    "clockwork": Clockwork,
    "symphony": Symphony,
    "packing": Packing,
}
