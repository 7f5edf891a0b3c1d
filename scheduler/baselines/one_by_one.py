"""One request at a time: no two share a bundle, whatever else could."""

from __future__ import annotations

from collections.abc import Sequence

from coalesce.scheduler.baselines.desk import Ready, Run
from coalesce.scheduler.baselines.menu import fastest


def run_first(ready: Sequence[Ready], start_ns: int) -> Run:
    """The first by the policy's order, in the fastest executable."""
    first = min(ready, key=lambda r: r.queue.items[0][:2])
    return Run(first, fastest(first.options), 1)
