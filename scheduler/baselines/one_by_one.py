"""One request at a time: no two share a bundle, whatever else could."""

from __future__ import annotations

from collections.abc import Sequence

from coalesce.scheduler.baselines.desk import Ready, Run


def run_first(ready: Sequence[Ready], start_ns: int) -> Run:
    """The first by the policy's order, in the narrowest executable."""
    first = min(ready, key=lambda r: r.queue.items[0][:2])
    return Run(first, first.options[0], 1)
