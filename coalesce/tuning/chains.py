"""Products that may run in one launch, as the tuning database knows them: see coalesce/kernels/chained.py."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from coalesce.heavy import HeavyOp
from coalesce.tuning.entry import op_text

CHAINED, APART = "chained", "apart"  # what an entry of a chain may name, beside no kernel


class Chain(NamedTuple):
    feed: HeavyOp | None
    wide: HeavyOp
    narrow: HeavyOp | None

    def __str__(self) -> str:
        """What decides its work."""
        feed = f"{op_text(self.feed)} + " if self.feed else ""
        narrow = f" then {op_text(self.narrow)}" if self.narrow else ""
        return f"{feed}{op_text(self.wide)}{narrow}"

    @property
    def key(self) -> Hashable:
        return tuple(op and op.key for op in self)
