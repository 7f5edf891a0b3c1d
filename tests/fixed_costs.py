"""Costs that a reader of a test can add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coalesce.costs import Costs, device_of


class Fixed(Costs):
    """Every superkernel takes `op_us`, or what `op_us(op, groups, rows)` says; stacking an operand takes `stack_us`."""

    def __init__(
        self,
        op_us: float | Callable[..., float] = 10.0,
        stack_us: float = 1.0,
        loop_us: float = 2.0,
        wait: float = 0.0,
        least: float = 0.0,
    ) -> None:
        super().__init__(device_of("cpu"))
        self.op_us, self.stack_us, self.loop_us, self.wait, self.least = op_us, stack_us, loop_us, wait, least

    def op(self, op: Any, groups: int, rows: int = 1, kernel: str | None = None) -> float:
        return self.op_us(op, groups, rows) if callable(self.op_us) else self.op_us

    def stack(self, true_bytes: Any, padded_bytes: int) -> float:
        return self.stack_us

    def patches(self, op: Any, groups: int, rows: int = 1) -> float:
        return 0.0

    @property
    def launch(self) -> float:
        return 0.5

    @property
    def loop(self) -> float:
        return self.loop_us

    @property
    def loop_wait(self) -> float:
        return self.wait

    @property
    def margin(self) -> float:
        return self.least
